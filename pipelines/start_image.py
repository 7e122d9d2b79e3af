"""Images made from another one: noise is put on it up to a strength, and taken off again, everywhere or where a mask is white.

Whatever differs among families is their stock pipelines' own: diffusers' AutoPipelineForImage2Image and AutoPipelineForInpainting take
the parts of the pipeline that is loaded.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..toolkit.core.errors import UserError
from ..toolkit.core.paths import is_file
from ..toolkit.data.images import image_size, load_rgb, open_image
from ..toolkit.diffusion.model import DiffusionModel

MASKED_CHANNELS = {  # that diffusers' pipelines ask for by number: without the mask among the inputs, and with it
    "StableDiffusionInpaintPipeline": (4, 9), "StableDiffusionXLInpaintPipeline": (4, 9), "StableDiffusion3InpaintPipeline": (16, 33),
}  # fmt: skip


@dataclass(frozen=True)
class StartImage:
    """What an image is made from, at the size that it will have."""

    image: Image.Image
    strength: float
    """How much of the noise is put on it: 1 leaves nothing of it."""
    mask: Image.Image | None = None
    """White where it is made anew, black where it stays; without one it is made anew everywhere."""


def start_pipeline_class(name: str, *, masked: bool) -> Any:
    """The stock pipeline that makes images from an image with the parts of a pipeline; None where there is none with a strength."""
    from diffusers.pipelines import auto_pipeline

    key = next(
        (key for key, own in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if own.__name__ == name), None
    )
    table = auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING if masked else auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    found = table.get(key or "")
    return found if found is not None and "strength" in inspect.signature(found.__call__).parameters else None


def check_start(image: str, mask: str, strength: float, steps: int) -> None:
    """Raises UserError for what can be seen to be wrong without knowing the base."""
    if mask and not image:
        raise UserError("--mask says where an image is made anew: give the image, too, by --image.")
    for option, path in (("--image", image), ("--mask", mask)):
        if path and not is_file(Path(path)):
            raise UserError(f"{option} {path} does not exist.")
        if path:
            load_rgb(Path(path))
    if not image:
        return
    if not 0 < strength <= 1:
        raise UserError(f"--image-strength must be above 0 and at most 1, not {strength:g}.")
    if int(steps * strength) < 1:
        raise UserError(
            f"--image-strength {strength:g} of --steps {steps} leaves no step: take more of one of the two."
        )
    if mask and image_size(Path(mask)) != image_size(Path(image)):
        raise UserError(f"--mask {mask} has another size than --image {image}: make it as large, in pixels.")


def check_start_of_base(base: DiffusionModel, *, masked: bool) -> None:
    """Raises UserError for a base whose stock pipelines cannot do it."""
    option, what = ("--mask", "only where a mask is white") if masked else ("--image", "from an image")
    cure = f"leave {option} out, or take another base"
    stock = start_pipeline_class(base.index["_class_name"], masked=masked)
    if stock is None:
        raise UserError(f"diffusers has no pipeline that makes images {what} for {base.title}: {cure}.")
    channels = base.part_config(base.denoiser_name).get("in_channels")
    known = MASKED_CHANNELS.get(stock.__name__, (channels,))
    if channels not in known:
        raise UserError(
            f"diffusers' {stock.__name__} takes denoisers of {' or '.join(map(str, known))} input channels, and this base's has "
            f"{channels}: {cure}."
        )


def start_size(image: str, width: int, unit: int) -> int:
    """The height, pixels, that an image of this width has in the shape of the one that it is made from, in whole units."""
    own_width, own_height = image_size(Path(image))
    return max(unit, round(width * own_height / own_width / unit) * unit)


def load_start(image: str, mask: str, strength: float, size: tuple[int, int]) -> StartImage:
    """The image, and its mask, scaled to a size (width, height), what goes beyond its shape cut off at the edges."""
    found = ImageOps.fit(load_rgb(Path(image)), size, Image.Resampling.LANCZOS)
    if not mask:
        return StartImage(found, strength)
    with open_image(Path(mask)) as opened:
        white = ImageOps.exif_transpose(opened).convert("L")
    return StartImage(found, strength, ImageOps.fit(white, size, Image.Resampling.BILINEAR))


def start_pipeline(pipe: Any, *, masked: bool) -> Any:
    """The stock pipeline for it, with the parts of a loaded one."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    made: Any = (AutoPipelineForInpainting if masked else AutoPipelineForImage2Image).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def start_kwargs(pipe: Any, start: StartImage, n: int) -> dict[str, Any]:
    """The arguments of its __call__ for `n` images that start from one. pipe: of `start_pipeline`."""
    given: dict[str, Any] = {"image": [start.image] * n, "strength": start.strength}
    if start.mask is not None:
        given["mask_image"] = [start.mask] * n
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        given |= {"width": start.image.width, "height": start.image.height}
    return given
