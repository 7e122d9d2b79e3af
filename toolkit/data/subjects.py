"""Images of a subject: found, checked and brought to the size the model trains at."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, ImageStat

from ..core.errors import UserError
from ..core.out_of_memory import oom_context
from .image_folder import read_image_folders
from .images import READ_ERRORS, image_size, load_rgb, open_image

ALPHA = "alpha"  # instead of a folder of masks: the images' own transparency


STRETCH = "stretch"
"""Instead of a crop, where a stock pipeline itself scales references: all of them, to a shape that is nearly theirs."""


@dataclass(frozen=True)
class Sample:
    """One training image: its file, its caption (None: use the run's prompt) and whether it is mirrored."""

    path: Path
    caption: str | None = None
    flip: bool = False
    repeats: int = 1
    """How often it is drawn for once of another image."""
    source: str = field(default="", compare=False)
    """Where its caption is from: the name of a file or folder; '' for the run's prompt."""
    references: tuple[Path, ...] = ()
    """Images that it is made from, see references.py."""


def find_samples(folder: Path, *, flip: bool = False, skip_bad: bool = False, option: str = "--images") -> list[Sample]:
    """The images of a folder with their captions, sorted by name.

    Captions: see captions.py; kohya's layout: see image_folder.py. option: what errors call the folder.

    Raises:
        UserError: as `read_image_folders` does.
    """
    mirrored = (False, True) if flip else (False,)
    return [
        Sample(path, own.caption(path), side, own.repeats, own.caption_source(path), own.references(path))
        for own in read_image_folders(folder, skip_bad=skip_bad, option=option)
        for path in own.images
        for side in mirrored
    ]


@oom_context("reading an image")
def load_image(sample: Sample, size: tuple[int, int], crop: str) -> Image.Image:
    """The image as RGB of this (width, height): turned as its EXIF says, transparency on white, cropped or padded."""
    image = load_rgb(sample.path)
    return resize(image, sample, size, crop, border_colour(image))


def whole_references(sample: Sample) -> list[Image.Image]:
    """The references of a sample at their own sizes."""
    images = [load_rgb(path) for path in sample.references]
    return [ImageOps.mirror(image) for image in images] if sample.flip else images


def load_mask(sample: Sample, masks: str, size: tuple[int, int], crop: str) -> Image.Image:
    """What counts in an image (white) and what does not, brought to the size as the image is: from a folder, or its alpha."""
    file = sample.path if masks == ALPHA else mask_path(sample, masks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(file) as opened:
                image = ImageOps.exif_transpose(opened)
                in_alpha = masks == ALPHA or is_cut_out(image)
                mask = image.convert("RGBA").getchannel("A") if in_alpha else image.convert("L")
    except (*READ_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"The mask {file} is not a valid image (truncated, far too large, or another kind of file)."
        ) from error
    return resize(mask, sample, size, crop, 0)


def is_cut_out(image: Image.Image) -> bool:
    """Whether an image says by transparency what is in it."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # type: ignore[operator]


def resize(
    image: Image.Image, sample: Sample, size: tuple[int, int], crop: str, border: int | tuple[int, ...]
) -> Image.Image:
    """Cropped to the size, padded or stretched, and mirrored where the sample says so."""
    if crop == STRETCH:
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif crop == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=border)
    else:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return ImageOps.mirror(image) if sample.flip else image


def sample_size(sample: Sample) -> tuple[int, int]:
    """(width, height) as the image is seen."""
    return image_size(sample.path)


def mask_path(sample: Sample, masks: str) -> Path:
    """The mask's file: NAME.png in the folder of masks, or in a folder there that is called as the image's own folder is."""
    folders = (Path(masks) / sample.path.parent.name, Path(masks))
    names = (f"{sample.path.stem}.png", f"{sample.path.name}.png")
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    return found[0] if found else Path(masks) / names[0]


def check_masks(samples: list[Sample], masks: str) -> None:
    """Checks that each image has a mask of its own, of the size that it is seen in.

    Raises:
        UserError: naming the image that has none, or whose mask is another image's too, is of another size or has no white in it.
    """
    owners: dict[Path, Path] = {}
    for path in dict.fromkeys(sample.path for sample in samples):
        sample = Sample(path)
        size = sample_size(sample)
        if masks == ALPHA:
            with open_image(path) as image:
                if not image.has_transparency_data:
                    raise UserError(f"{path} has no transparency to be its mask; give a folder with --masks instead.")
        else:
            file = mask_path(sample, masks)
            if not file.is_file():
                raise UserError(f"{path.name} has no mask: expected {file}, white where the subject is.")
            if (other := owners.setdefault(file, path)) != path:
                raise UserError(
                    f"{file} would be the mask of {other} and of {path}: call the masks as the whole names ({path.name}.png), or put those "
                    f"of each folder into one of its name ({Path(masks) / path.parent.name})."
                )
            width, height = image_size(file)
            if (width, height) != size:
                raise UserError(
                    f"{file} is {width} x {height} pixels and its image, as it is seen, {size[0]} x {size[1]}: make them alike."
                )
        if mask_share(sample, masks) == 0:
            raise UserError(f"The mask of {path} has no white in it, so nothing of the image would be learned.")


def mask_share(sample: Sample, masks: str) -> float:
    """The share of an image that its mask counts, 0 to 1."""
    mask = load_mask(sample, masks, sample_size(sample), "center")
    return float(ImageStat.Stat(mask).mean[0]) / 255


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """The mean colour of the image, for the padding."""
    return tuple(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]
