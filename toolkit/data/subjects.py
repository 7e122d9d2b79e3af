"""Images of a subject and their captions: found, checked and brought to the size the model trains at."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import UserError
from ..core.out_of_memory import oom_context
from ..core.texts import read_lines, read_text
from .images import image_size, load_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
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

    A caption stands in `name.txt` beside the image or in the `text` field of metadata.jsonl (imagefolder convention).
    option: what errors call the folder.

    Raises:
        UserError: naming the file that is missing, empty, broken, too small or too large, or a caption without an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{option} {folder} is not a folder.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
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


def read_captions(folder: Path, files: list[Path], images: set[str]) -> dict[str, str]:
    """Caption by image name."""
    captions: dict[str, str] = {}
    table = folder / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(read_lines(table), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = str(row["file_name"]).replace("\\", "/").removeprefix("./"), row["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{table}, line {number}: needs the fields file_name and text.") from error
            if name not in images:
                raise UserError(f"{table}, line {number}: there is no image '{name}' in {folder}.")
            captions[name] = str(text).strip()
    stems: dict[str, list[str]] = {}
    for name in images:
        stems.setdefault(Path(name).stem, []).append(name)
    for path in files:
        if path.suffix.lower() != ".txt":
            continue
        if path.stem not in stems:
            raise UserError(f"{path} is a caption without an image: add '{path.stem}.png' (or .jpg) or remove it.")
        for name in stems[path.stem]:
            captions[name] = read_text(path).strip()
    return {name: text for name, text in captions.items() if text}


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
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "unpacks to far more pixels than its size suggests (a decompression bomb)."
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
        mask = image.convert("RGBA").getchannel("A") if masks == ALPHA else image.convert("L")
    return resize(mask, sample, size, crop, 0)


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
    """Raises UserError when an image has no mask, or one of another size."""
    for sample in samples:
        with Image.open(sample.path) as image:
            size, clear = image.size, image.has_transparency_data
        if masks == ALPHA:
            if not clear:
                raise UserError(
                    f"{sample.path} has no transparency to be its mask; give a folder with --masks instead."
                )
            continue
        path = mask_path(sample, masks)
        if not path.is_file():
            raise UserError(f"{sample.path.name} has no mask: expected {path}, white where the subject is.")
        with Image.open(path) as mask:
            if mask.size != size:
                raise UserError(
                    f"{path} is {mask.width} x {mask.height} pixels and its image {size[0]} x {size[1]}: make them alike."
                )


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """The mean colour of the image, for the padding."""
    return tuple(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]
