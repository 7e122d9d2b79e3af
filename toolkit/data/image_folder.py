"""A folder of images as people have it: what of it is used, and what is not, with the reason.

Images lie in the folder itself, or, in kohya's layout, in folders below whose names say repeats and prompt (`10_sks dog`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..core.errors import UserError, list_names
from .captions import TABLES, Captions, is_sidecar, read_captions
from .images import CAN_READ_HEIF, HEIF_SUFFIXES, READ_ERRORS, image_size, open_image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif",
    *(HEIF_SUFFIXES if CAN_READ_HEIF else ()),
)  # fmt: skip
UNREADABLE = (
    ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".svg",
    *(() if CAN_READ_HEIF else HEIF_SUFFIXES),
)  # fmt: skip
"""Images that people have beside those that can be read."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # of file managers; hidden files are passed over too
REPEATS = re.compile(r"(\d+)_(.+)")  # a folder of kohya's layout: repeats and prompt
MAX_REPEATS = 10_000
MIN_SIDE = 16  # a side below this has nothing to learn from, pixels
MAX_SIDE = 16_384  # a side above this is a mistake more often than a photo, pixels


@dataclass(frozen=True)
class ImageFolder:
    """What one folder of images holds."""

    path: Path
    images: tuple[Path, ...]
    """Images that are used, by name."""
    captions: Captions
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of each image that is not used -> the reason."""
    unused: tuple[str, ...] = ()
    """Names of other files, and of folders with images, that are not used."""
    repeats: int = 1
    """How often each image is drawn for once of another's."""
    prompt: str | None = None
    """The caption of images without one, where the folder's name says it."""

    def caption(self, image: Path) -> str | None:
        """An image's caption; None where it has none."""
        return self.captions.texts.get(image.name, self.prompt)

    def caption_source(self, image: Path) -> str:
        """Where an image's caption is from: a file's name, the folder's, or ''."""
        if image.name in self.captions.texts:
            return self.captions.sources[image.name]
        return self.path.name if self.prompt else ""

    def references(self, image: Path) -> tuple[Path, ...]:
        """The images that a table names as an image's references.

        Raises:
            UserError: for anything but names.
        """
        value = self.captions.references.get(image.name, [])
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{image}: its references must be the name of an image, or a list of names.")
        return tuple(self.path / name.replace("\\", "/") for name in names)

    def notes(self, used_elsewhere: Collection[Path] = ()) -> list[str]:
        """What is not used, or not used as it stands there, in sentences. used_elsewhere: files and folders that something else reads."""
        found = list(self.captions.notes)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        found += [f"Not used: {list_names(names)}: {reason}" for reason, names in reasons.items()]
        if unused := [name for name in self.unused if (self.path / name).resolve() not in used_elsewhere]:
            found.append(f"Not used, neither an image nor a caption of one: {list_names(unused)}.")
        if animated := [path.name for path in self.images if is_animated(path)]:
            found.append(f"Of {list_names(animated)}, only the first frame is used.")
        return [f"{text} ({self.path})" for text in found]


def read_image_folders(folder: Path, *, skip_bad: bool = False, option: str = "--images") -> list[ImageFolder]:
    """The folder, or the folders of kohya's layout that it holds.

    option: what errors call the folder.

    Raises:
        UserError: naming the file that is missing, empty, broken, too small or too large, a caption without an image, or folders with
            images that would be passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{option} {folder} is not a folder.")
    own = [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]
    below = folders_below(folder)
    kohya = [(path, match) for path in below if (match := REPEATS.fullmatch(path.name))]
    if not kohya:
        check_overlooked(folder, below, has_images=bool(own), option=option)
        return [read_image_folder(folder, skip_bad=skip_bad, option=option)]
    others = [*own, *(path for path in below if not REPEATS.fullmatch(path.name))]
    if others:
        raise UserError(
            f"{option} {folder} holds folders such as '{kohya[0][0].name}' (repeats and prompt, as in kohya's tools) and beside them "
            f"{list_names([path.name for path in others])}: put these into such a folder, as '1_{kohya[0][1][2]}', or elsewhere."
        )
    return [
        read_image_folder(path, skip_bad=skip_bad, option=option, repeats=int(match[1][:9]), prompt=match[2].strip())
        for path, match in kohya
    ]


def read_image_folder(
    folder: Path, *, skip_bad: bool, option: str, repeats: int = 1, prompt: str | None = None
) -> ImageFolder:
    """What one folder holds; raises UserError as `read_image_folders` does."""
    if not 1 <= repeats <= MAX_REPEATS:
        raise UserError(f"{option} {folder}: its name says {repeats} repeats; 1 to {MAX_REPEATS:,} can be.")
    files = list_files(folder)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    captions = read_captions(folder, files, {path.name for path in images})
    left_out = {
        path.name: "images of this kind cannot be read; save them as JPEG or PNG"
        + ("" if path.suffix.lower() not in HEIF_SUFFIXES else ', or run: pip install "rankfold[heif]".')
        for path in files
        if path.suffix.lower() in UNREADABLE
    }
    if not images:
        if left_out:
            raise UserError(f"{option} {folder}: {list_names(list(left_out))} cannot be read: save as JPEG or PNG.")
        what = "is empty" if not files else "holds no images"
        raise UserError(f"{option} {folder} {what}: put in at least one of {', '.join(SUFFIXES)}.")
    good = []
    for path in images:
        fault = image_fault(path)
        if fault is None:
            good.append(path)
        elif not skip_bad:
            raise UserError(f"{path}: {fault} Remove it, or leave such files out with --skip-bad.")
        else:
            left_out[path.name] = fault
    if not good:
        raise UserError(f"{option} {folder}: none of the {len(images)} images can be used.")
    return ImageFolder(folder, tuple(good), captions, left_out, unused_names(folder, files, images), repeats, prompt)


def list_files(folder: Path) -> list[Path]:
    """The files of a folder, but for hidden ones and those of file managers, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name.lower() not in SYSTEM_FILES
    )


def folders_below(folder: Path) -> list[Path]:
    """Folders in this one that hold images."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".") and has_any_image(path)
    ]


def unused_names(folder: Path, files: list[Path], images: list[Path]) -> tuple[str, ...]:
    """Names in a folder that are neither images nor captions, and of folders with images."""
    stems = {path.stem for path in images}
    known = {*images, *(path for path in files if is_sidecar(path, stems) or path.suffix.lower() in UNREADABLE)}
    others = [path.name for path in files if path not in known and path.name not in TABLES]
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return (*others, *(f"{path.name}/" for path in below if holds_images(path)))


def check_overlooked(folder: Path, below: list[Path], *, has_images: bool, option: str) -> None:
    """Raises UserError where a folder holds no images, and folders below it do."""
    if below and not has_images:
        raise UserError(
            f"{option} {folder} holds folders with images: {list_names([path.name for path in below])}. Give one of them, such as "
            f"{option} '{below[0]}'; more subjects go with --also."
        )


def has_any_image(folder: Path) -> bool:
    """Whether a folder holds an image, by its files' names."""
    try:
        return any(path.suffix.lower() in (*SUFFIXES, *UNREADABLE) for path in folder.iterdir() if path.is_file())
    except OSError:
        return False


def holds_images(folder: Path, levels: int = 3) -> bool:
    """Whether a folder, or one of so many levels below it, holds an image."""
    if has_any_image(folder):
        return True
    try:
        below = [path for path in folder.iterdir() if path.is_dir()] if levels else []
    except OSError:
        return False
    return any(holds_images(path, levels - 1) for path in below)


def image_fault(path: Path) -> str | None:
    """What is wrong with an image, as a sentence; None if it can be used. The whole image is decoded, once for each state of the file."""
    try:
        facts = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return decoding_fault(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=100_000)
def decoding_fault(path: Path, size: int, changed: int) -> str | None:
    """The same for a file of this size that was changed at this time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(path) as image:
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
    except ValueError as error:
        if "text" in str(error).lower():  # Pillow's limits for texts in PNG files
            return "carries more text beside its pixels than is read; save it anew without metadata."
        return "is not a valid image (truncated, or another kind of file)."
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's
            return f"cannot be read ({error.strerror})."
        return "is not a valid image (truncated, or another kind of file)."
    return None


def is_animated(path: Path) -> bool:
    """Whether an image has more than one frame."""
    with open_image(path) as image:
        return (
            getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        )  # which holds a photo's preview, as phones write it
