"""Images from the browser: single files and zips, checked before anything is kept."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ....toolkit.core.errors import UserError
from ....toolkit.core.files import write_atomic
from ....toolkit.data.captions import SIDECARS, TABLES, read_captions
from ....toolkit.data.image_folder import REPEATS, SUFFIXES, image_fault
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
    """Puts images and captions into a folder, all in one; returns a sentence for each that was refused or is not used as it was given.

    Raises:
        UserError: for a zip that is none, is too large, or leads out of its folder, or a full disk. What was new is gone then.
    """
    said: list[str] = []
    made: list[Path] = []
    try:
        for file in map(Path, files):
            for name, data in unpacked(file, said):
                path = folder / name
                if path in made:
                    said.append(f"{name} was given twice: the first is kept. Rename the other.")
                    continue
                if not path.exists():
                    made.append(path)
                write_atomic(path, data)
                if path.suffix.lower() in SUFFIXES and (fault := image_fault(path)):
                    path.unlink()
                    said.append(f"{name}: {fault}")
        return said + drop_orphans(folder, made)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def drop_orphans(folder: Path, made: Sequence[Path]) -> list[str]:
    """Deletes new captions that belong to no image, for with them no set can be read; returns a sentence for each."""
    stems = {path.stem for path in folder.iterdir() if path.suffix.lower() in SUFFIXES} if folder.is_dir() else set()
    orphans = [path for path in made if path.suffix.lower() in (".txt", ".caption") and path.stem not in stems]
    for path in orphans:
        path.unlink(missing_ok=True)
    return [f"{path.name} is not kept: there is no image of its name. Add both together." for path in orphans]


def unpacked(file: Path, said: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an uploaded file, or of those in a zip. said: sentences of what is not used as it was given."""
    if file.suffix.lower() == ".zip":
        given = list(unpack_zip(file))
        names = flat_names([path for path, _ in given], said)
        captioned = {path.with_suffix("") for path, _ in given if path.suffix.lower() in SIDECARS}
        for path, data in given:
            if path not in names:
                continue
            yield names[path], data
            prompt = REPEATS.fullmatch(path.parent.name)
            if prompt and path.suffix.lower() in SUFFIXES and path.with_suffix("") not in captioned:
                yield f"{PurePosixPath(names[path]).stem}.txt", prompt[2].encode()
    elif file.suffix.lower() in ALLOWED_SUFFIXES:
        yield file.name, file.read_bytes()
    else:
        said.append(f"{file.name}: neither an image, a caption (.txt) nor a zip.")


def flat_names(paths: Sequence[PurePosixPath], said: list[str]) -> dict[PurePosixPath, str]:
    """A name in one folder for each of a zip's files; those that share theirs with another are called by their folder, too.

    said: is told of tables that then belong to no images, and of repeats, which a set does not have.
    """
    counts = Counter(path.name for path in paths)
    clashing = {PurePosixPath(name).stem for name, count in counts.items() if count > 1}
    names = {}
    for path in paths:
        folder = "-".join(path.parent.parts).replace(" ", "-")
        if path.name in TABLES and counts[path.name] > 1:
            said.append(f"{path} is not used, for there are several of its name: give each folder as a set of its own.")
        elif path.stem in clashing and folder:
            names[path] = f"{folder}-{path.name}"
        else:
            names[path] = path.name
    for name in dict.fromkeys(path.parent.name for path in paths):
        if (found := REPEATS.fullmatch(name)) and int(found[1]) != 1:
            said.append(
                f"{name}: its images get the caption {found[2]!r}; the {found[1]} repeats are not used, a set counts each image once."
            )
    return names


def unpack_zip(file: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Paths and contents of the images and captions in a zip.

    Raises:
        UserError: see `store_uploads`. Nothing has been unpacked then.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                path = entry_path(entry)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{file.name} holds the name {entry.filename!r}, which leads out of its folder.")
            entries = [e for e in entries if is_wanted(entry_path(e))]
            if len(entries) > MAX_FILES:
                raise UserError(f"{file.name} holds {len(entries)} files, more than {MAX_FILES}.")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise UserError(f"{file.name} unpacks to more than {MAX_BYTES >> 30} GiB.")
            for entry in entries:
                with archive.open(entry) as opened:
                    data = opened.read(MAX_FILE_BYTES + 1)  # what it says of its own size may be a lie
                if len(data) > MAX_FILE_BYTES:
                    raise UserError(f"{file.name}: {entry.filename} unpacks to more than {MAX_FILE_BYTES >> 20} MiB.")
                yield entry_path(entry), data
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{file.name} is not a valid zip file, or has a password.") from error


def entry_path(entry: zipfile.ZipInfo) -> PurePosixPath:
    """Where a zip's entry lies in it."""
    return PurePosixPath(entry.filename.replace("\\", "/"))


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
