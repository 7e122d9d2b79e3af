"""A mask painted over the image that others start from: what is painted is made anew."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from ....toolkit.core.errors import UserError
from ....toolkit.data.images import image_size

BRUSH = "rgb(99, 102, 241)"  # seen on light images and on dark ones
BRUSHES = 10  # as many strokes beside each other cover an image
KEPT = 16  # paintings on their way from browsers, whoever sends them


class RecentPaintings(OrderedDict[str, Any]):
    """What browsers have sent of paintings that no event has asked for yet: the latest few, for each may be as large as an upload."""

    def __setitem__(self, key: str, painting: Any) -> None:
        super().__setitem__(key, painting)
        while len(self) > KEPT:
            self.popitem(last=False)


class MaskPainter:
    """The image again, to paint on; there while there is an image."""

    def __init__(self, image: gr.Image) -> None:
        self.editor = gr.ImageEditor(
            label="Or paint what is new", type="pil", sources=(), layers=False, transforms=(), format="png", buttons=[],
            visible=False, height=340, elem_id="start-painted",
        )  # fmt: skip
        self.editor.blob_storage = RecentPaintings()
        image.change(show_image, image, self.editor, api_visibility="private", show_progress="hidden")


def show_image(file: str | None) -> Any:
    """The image to paint on, with nothing painted and a brush of its size."""
    if not file:
        return gr.ImageEditor(None, visible=False)
    size = max(4, min(image_size(Path(file))) // BRUSHES)
    brush = gr.Brush(default_size=size, colors=[BRUSH], default_color=BRUSH, color_mode="fixed")
    value = {"background": file, "layers": [], "composite": None}
    return gr.ImageEditor(value, brush=brush, eraser=gr.Eraser(default_size=size), visible=True)


def save_painted_mask(painting: dict[str, Any] | None, image: str | None, file: Path) -> bool:
    """Writes a painting as a mask, as large as the image and white where something is painted; whether anything is.

    Raises:
        UserError: for a painting that did not arrive, which must not turn into an image made anew everywhere.
    """
    if not painting or not image:
        return False
    if painting["background"] is None:
        raise UserError("The painted mask did not arrive: press the button again.")
    mask = Image.new("L", image_size(Path(image)))
    for layer in painting["layers"]:
        painted = layer.getchannel("A").point(lambda value: 255 if value else 0)
        mask = ImageChops.lighter(mask, painted.resize(mask.size, Image.Resampling.NEAREST))
    mask.save(file)
    return mask.getbbox() is not None
