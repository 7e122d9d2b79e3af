"""Images of a subject: found, checked and brought to the size the model trains at."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import UserError
from ..core.out_of_memory import oom_context
from .captions import read_captions
from .images import image_size, load_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
UNREADABLE = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".svg")
"""Images that people have beside those that can be read."""
REPEATS = re.compile(r"(\d+)_(.+)")  # a folder of kohya's layout: repeats and prompt
MIN_SIDE = 16  # a side below this has nothing to learn from, pixels
ALPHA = "alpha"  # instead of a folder of masks: the images' own transparency
MAX_SIDE = 16_384  # a side above this is a mistake more often than a photo, pixels


@dataclass(frozen=True)
class Sample:
    """One training image: its file, its caption (None: use the run's prompt) and whether it is mirrored."""

    path: Path
    caption: str | None = None
    flip: bool = False


def find_samples(folder: Path, *, flip: bool = False, skip_bad: bool = False, option: str = "--images") -> list[Sample]:
    """The images of a folder with their captions, sorted by name.

    Captions: see captions.py. option: what errors call the folder.

    Raises:
        UserError: naming the file that is missing, empty, broken, too small or too large, a caption without an image, or folders with
            images that would be passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{option} {folder} is not a folder.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
    check_overlooked(folder, has_images=bool(images), option=option)
    captions = read_captions(folder, files, {p.name for p in images})
    if not images:
        what = "is empty" if not files else "holds no images"
        raise UserError(f"{option} {folder} {what}: put in at least one of {', '.join(SUFFIXES)}.")
    good = []
    for path in images:
        fault = image_fault(path)
        if fault is None:
            good.append(path)
        elif not skip_bad:
            raise UserError(f"{path}: {fault} Remove it, or leave such files out with --skip-bad.")
    if not good:
        raise UserError(f"{option} {folder}: none of the {len(images)} images can be used.")
    mirrored = (False, True) if flip else (False,)
    return [Sample(path, captions.get(path.name), side) for path in good for side in mirrored]


def unreadable_images(folder: Path) -> list[str]:
    """Names of images of a kind that cannot be read, which `find_samples` leaves out."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in UNREADABLE)


def folders_below(folder: Path) -> list[Path]:
    """Folders in this one that hold images, which `find_samples` does not look into."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and has_any_image(path)]


def check_overlooked(folder: Path, *, has_images: bool, option: str) -> None:
    """Raises UserError where the images that are meant would be passed over.

    That is where all there are cannot be read or lie in folders below, and in kohya's layout, where a folder's name says repeats and
    prompt.
    """
    if (names := unreadable_images(folder)) and not has_images:
        raise UserError(f"{option} {folder}: {', '.join(names[:5])} cannot be read: save as JPEG or PNG.")
    below = folders_below(folder)
    kohya = next((path for path in below if REPEATS.fullmatch(path.name)), None)
    if not below or (has_images and kohya is None):
        return
    repeats, prompt = REPEATS.fullmatch(kohya.name).groups() if kohya else ("", "")  # type: ignore[union-attr]
    hint = f" ({repeats} repeats of '{prompt}', as kohya's tools read it)" if kohya else ""
    more = "also " if has_images else ""
    raise UserError(
        f"{option} {folder} {more}holds folders with images: {', '.join(path.name for path in below[:5])}{hint}. Give one of them, such as "
        f"{option} '{kohya or below[0]}'; more subjects go with --also."
    )


def has_any_image(folder: Path) -> bool:
    """Whether a folder holds an image, by its files' names."""
    return any(path.suffix.lower() in (*SUFFIXES, *UNREADABLE) for path in folder.iterdir() if path.is_file())


def image_fault(path: Path) -> str | None:
    """What is wrong with an image, as a sentence; None if it can be used. The whole image is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if min(image.size) < MIN_SIDE:
                    return f"is {image.width} x {image.height} pixels, less than {MIN_SIDE} on a side."
                if max(image.size) > MAX_SIDE:
                    return f"is {image.width} x {image.height} pixels, more than {MAX_SIDE} on a side; reduce it first."
                image.load()
    except Image.DecompressionBombWarning:
        width, height = image_size(path)
        return f"is {width} x {height} pixels ({width * height / 1e6:.0f} megapixels), too many to be read; reduce it first."
    except Image.DecompressionBombError as error:  # Pillow says no more than how many
        pixels = int(re.search(r"\d+", str(error)).group())  # type: ignore[union-attr]
        return f"has {pixels / 1e6:.0f} megapixels, too many to be read; reduce it first."
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return "is not a valid image (truncated, or another kind of file)."
    return None


@oom_context("reading an image")
def load_image(sample: Sample, size: tuple[int, int], crop: str) -> Image.Image:
    """The image as RGB of this (width, height): turned as its EXIF says, transparency on white, cropped or padded."""
    image = load_rgb(sample.path)
    return resize(image, sample, size, crop, border_colour(image))


def load_mask(sample: Sample, masks: str, size: tuple[int, int], crop: str) -> Image.Image:
    """What counts in an image (white) and what does not, brought to the size as the image is: from a folder, or its alpha."""
    with Image.open(sample.path if masks == ALPHA else mask_path(sample, masks)) as opened:
        image = ImageOps.exif_transpose(opened)
        in_alpha = masks == ALPHA or is_cut_out(image)
        mask = image.convert("RGBA").getchannel("A") if in_alpha else image.convert("L")
    return resize(mask, sample, size, crop, 0)


def is_cut_out(image: Image.Image) -> bool:
    """Whether an image says by transparency what is in it."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # type: ignore[operator]


def resize(
    image: Image.Image, sample: Sample, size: tuple[int, int], crop: str, border: int | tuple[int, ...]
) -> Image.Image:
    """Cropped to the size or padded, and mirrored where the sample says so."""
    if crop == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=border)
    else:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return ImageOps.mirror(image) if sample.flip else image


def sample_size(sample: Sample) -> tuple[int, int]:
    """(width, height) as the image is seen."""
    return image_size(sample.path)


def mask_path(sample: Sample, masks: str) -> Path:
    """The mask's file."""
    return Path(masks) / f"{sample.path.stem}.png"


def check_masks(samples: list[Sample], masks: str) -> None:
    """Raises UserError when an image has no mask, or one of another size than it is seen in."""
    for sample in samples:
        size = sample_size(sample)
        with Image.open(sample.path) as image:
            clear = image.has_transparency_data
        if masks == ALPHA:
            if not clear:
                raise UserError(
                    f"{sample.path} has no transparency to be its mask; give a folder with --masks instead."
                )
            continue
        path = mask_path(sample, masks)
        if not path.is_file():
            raise UserError(f"{sample.path.name} has no mask: expected {path}, white where the subject is.")
        width, height = image_size(path)
        if (width, height) != size:
            raise UserError(
                f"{path} is {width} x {height} pixels and its image, as it is seen, {size[0]} x {size[1]}: make them alike."
            )


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """The mean colour of the image, for the padding."""
    return tuple(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]
