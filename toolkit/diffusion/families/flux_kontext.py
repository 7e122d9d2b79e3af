"""FLUX.1 Kontext: makes an image from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .flux import Flux


class FluxKontext(Flux):
    """FLUX.1 Kontext: the image that is changed lies behind the tokens of the one that is made, at places of its own."""

    pipelines = ("FluxKontextPipeline",)
    title = "FLUX.1 Kontext"
    architecture = "flux-1-dev-kontext"
    max_references = 1
    layer_marks = ()  # its files name the layers that FLUX.1's do
    licence = "Non-commercial licence of Black Forest Labs."

    @classmethod
    def image_kwargs(cls, references: Sequence[Image.Image], width: int, height: int) -> dict[str, Any]:
        """The pipeline would bring the image to a megapixel, and the reference to one of its own sizes: both stay as they are."""
        given = super().image_kwargs(references, width, height) | {"max_area": width * height, "_auto_resize": False}
        return given | {"image": references[0]} if references else given
