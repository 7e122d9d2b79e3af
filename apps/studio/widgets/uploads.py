"""Images from the browser: single files and zips, checked before anything is kept."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ....toolkit.core.errors import UserError
from ....toolkit.core.files import write_atomic
from ....toolkit.data.captions import SIDECARS, read_captions
from ....toolkit.data.image_folder import SUFFIXES, image_fault
from ....toolkit.data.images import image_size, load_rgb
from ....toolkit.data.subjects import Sample, load_image

MAX_FILES = 2000
MAX_BYTES = 2 * 2**30  # of all that a zip unpacks to
MAX_FILE_BYTES = 200 * 2**20
ALLOWED_SUFFIXES = (*SUFFIXES, *SIDECARS, ".jsonl", ".json", ".csv")
MAX_FINGERPRINT_DISTANCE = 4  # bits of 64 in which the fingerprints of near duplicates differ at most


@dataclass(frozen=True)
class UploadedImage:
    """One image of a set, as the page shows it."""

    path: Path
    width: int
    height: int
    caption: str
    like: str = ""
    """Name of an image before it that it repeats."""


def store_uploads(files: Sequence[str | Path], folder: Path) -> list[str]:
    """Puts images and captions into a folder; returns a sentence for each that was refused.

    Raises:
        UserError: for a zip that is none, is too large, or leads out of its folder.
    """
    refused = []
    for file in map(Path, files):
        if file.suffix.lower() == ".zip":
            kept = list(unpack_zip(file))
        elif file.suffix.lower() in ALLOWED_SUFFIXES:
            kept = [(file.name, file.read_bytes())]
        else:
            refused.append(f"{file.name}: neither an image, a caption (.txt) nor a zip.")
            continue
        for name, data in kept:
            write_atomic(folder / name, data)
            if Path(name).suffix.lower() in SUFFIXES and (fault := image_fault(folder / name)):
                (folder / name).unlink()
                refused.append(f"{name}: {fault}")
    return refused


def unpack_zip(file: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the images and captions in a zip, folders left out.

    Raises:
        UserError: see `store_uploads`. Nothing has been unpacked then.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{file.name} holds the name {entry.filename!r}, which leads out of its folder.")
            entries = [e for e in entries if is_wanted(PurePosixPath(e.filename.replace("\\", "/")))]
            if len(entries) > MAX_FILES:
                raise UserError(f"{file.name} holds {len(entries)} files, more than {MAX_FILES}.")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise UserError(f"{file.name} unpacks to more than {MAX_BYTES >> 30} GiB.")
            for entry in entries:
                with archive.open(entry) as opened:
                    data = opened.read(MAX_FILE_BYTES + 1)  # what it says of its own size may be a lie
                if len(data) > MAX_FILE_BYTES:
                    raise UserError(f"{file.name}: {entry.filename} unpacks to more than {MAX_FILE_BYTES >> 20} MiB.")
                yield PurePosixPath(entry.filename.replace("\\", "/")).name, data
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{file.name} is not a valid zip file, or has a password.") from error


def is_wanted(path: PurePosixPath) -> bool:
    """Whether a zip's entry is an image or caption, and not a system's own file."""
    return path.suffix.lower() in ALLOWED_SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts


def scan_folder(folder: Path) -> list[UploadedImage]:
    """The images of a folder with their captions, and which of them repeat another."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in SUFFIXES and image_fault(p) is None]
    captions = read_captions(folder, files, {p.name for p in images}).texts
    found: list[UploadedImage] = []
    prints: list[tuple[str, np.ndarray]] = []
    for path in images:
        own = fingerprint(load_rgb(path))
        like = next((name for name, other in prints if int((own != other).sum()) <= MAX_FINGERPRINT_DISTANCE), "")
        prints.append((path.name, own))
        width, height = image_size(path)
        found.append(UploadedImage(path, width, height, captions.get(path.name, ""), like))
    return found


def fingerprint(image: Image.Image) -> np.ndarray:
    """64 bits that stay nearly the same when an image is scaled or compressed: whether it brightens from cell to cell."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def crop_preview(found: UploadedImage, side: int) -> Image.Image:
    """The middle square of the image, small: what training sees unless it is told to pad or to keep shapes."""
    return load_image(Sample(found.path), (side, side), "center")


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    """Writes a .txt beside each image, or the .caption that is there; an empty caption removes it.

    Raises:
        UserError: for a name that is none of the folder's images.
    """
    known = {path.name: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    for name, caption in captions.items():
        if name not in known:
            raise UserError(f"There is no image named {name[:60]!r}.")
        own = known[name].with_suffix(".caption")
        file = own if own.is_file() else known[name].with_suffix(".txt")
        if caption.strip():
            write_atomic(file, caption.strip().encode())
        else:
            file.unlink(missing_ok=True)
