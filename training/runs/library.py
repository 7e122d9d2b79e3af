"""A library of trained adapters: a folder for each, with the adapter, what it is, and a thumbnail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from PIL import Image

from ...toolkit.core import locks
from ...toolkit.core.errors import UserError, did_you_mean
from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.paths import expand_user, is_path, place_from, windows_name_fault
from ...toolkit.core.records import as_type, read_record
from ...toolkit.core.system_faults import reason
from ...toolkit.core.systems import retry_while_locked
from ...toolkit.data.images import open_image
from ...toolkit.formats.adapter_folder import CONFIG, WEIGHTS
from ...toolkit.formats.locate import adapter_facts, adapter_path, content_hash

THUMBNAIL_SIDE = 128  # pixels, the longer side of a thumbnail
LOCK_FILE, UNFINISHED = ".lock", ".unfinished-"
LOCK_SECONDS = 60.0  # for which an addition waits for others


@dataclass(frozen=True)
class Entry:
    """One adapter of the library."""

    name: str
    base: str
    trigger: str
    """Trigger words of the subject."""
    hash: str
    adapter: str
    """Kind of adapter, as far as it says so."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return library_folder() / self.name

    @property
    def path(self) -> Path:
        """The adapter itself."""
        return next(path for path in (self.folder / "adapter", self.folder / "adapter.safetensors") if path.exists())

    @property
    def thumbnail(self) -> Path | None:
        """An image of it."""
        path = self.folder / "thumbnail.png"
        return path if path.is_file() else None


def library_folder() -> Path:
    """Where the library is: $RANKFOLD_LIBRARY or ~/.rankfold/library."""
    return place_from("RANKFOLD_LIBRARY", "~/.rankfold/library")


def add(path: Path, *, name: str = "", base: str = "", trigger: str = "", thumbnail: Path | None = None) -> Entry:
    """Copies the adapter of a run folder, an adapter folder or a LoRA file into the library.

    What is not given is taken from the adapter itself; the thumbnail of a run is its newest preview.

    Raises:
        UserError: when there is no adapter, the name is taken or no name, or nobody says what the base is.
    """
    place = adapter_path(path)
    hashed, facts = content_hash(place), adapter_facts(place)
    name = name or path.stem
    check_entry_name(name)
    base = base or facts.base
    if not base:
        raise UserError(f"{path} does not say which base model it was trained on: give it with --base.")
    entry = Entry(name, base, trigger or facts.trigger_words, hashed, facts.adapter)
    image = thumbnail or newest_preview(path)
    small = load_thumbnail(image) if image else None
    with writing_library():
        put_in(entry, place, small)
    return entry


def check_entry_name(name: str) -> None:
    """Raises UserError for what is no name of an adapter in the library."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name}: use letters, digits, dots, dashes and underscores only.")
    if fault := windows_name_fault(name):  # wherever it is now: a library may move to another system
        raise UserError(f"--name {name}: {fault} on Windows; choose another.")


def remove(name: str) -> None:
    """Deletes an adapter of the library.

    Raises:
        UserError: when the library does not have it, or cannot be written.
    """
    folder = get(name).folder
    with writing_library():
        aside = folder.with_name(f"{UNFINISHED}{uuid4().hex[:8]}")
        retry_while_locked(lambda: folder.replace(aside))
        shutil.rmtree(aside)


def rename(name: str, new: str) -> Entry:
    """Gives an adapter of the library another name.

    Raises:
        UserError: when the library does not have it, or cannot be written; for a name that is none or is taken.
    """
    entry = get(name)
    check_entry_name(new)
    renamed = replace(entry, name=new)
    with writing_library():
        if renamed.folder.exists():
            raise UserError(f"The library has an adapter named {new} already: choose another name.")
        unfinished = renamed.folder.with_name(f"{UNFINISHED}{uuid4().hex[:8]}")
        shutil.copytree(entry.folder, unfinished)  # so that a kill leaves one name or both, each whole
        write_text(unfinished / "entry.json", json.dumps(asdict(renamed), indent=1))
        retry_while_locked(lambda: unfinished.replace(renamed.folder))
        shutil.rmtree(entry.folder)
    return renamed


@contextmanager
def writing_library() -> Iterator[None]:
    """Within, no other process writes the library.

    Raises:
        UserError: when it cannot be written, or another process writes it for too long.
    """
    try:
        with locked_library():
            yield
    except OSError as error:
        raise UserError(
            f"The library {library_folder()} cannot be written: {reason(error)}. $RANKFOLD_LIBRARY names another folder."
        ) from error


@contextmanager
def locked_library() -> Iterator[None]:
    """Within, no other process adds to the library. What additions that were killed have left is deleted.

    Raises:
        UserError: when another process is at it for too long.
    """
    folder = library_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not locks.acquire(folder / LOCK_FILE, wait=LOCK_SECONDS):
        raise UserError(f"Another process has been adding to the library {folder} for {LOCK_SECONDS:g} s: try again.")
    try:
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        locks.release(folder / LOCK_FILE)


def put_in(entry: Entry, place: Path, thumbnail: Image.Image | None) -> None:
    """Adds an adapter to the library, whole or not at all.

    Raises:
        UserError: when the name is taken.
    """
    if entry.folder.exists() and read_entry(entry.folder) is not None:
        raise UserError(
            f"The library has an adapter named {entry.name} already: choose another --name, or delete {entry.folder}."
        )
    unfinished = entry.folder.with_name(f"{UNFINISHED}{uuid4().hex[:8]}")  # an addition that is killed takes no name
    try:
        write_adapter(place, unfinished)
        if thumbnail:
            write_png(unfinished / "thumbnail.png", thumbnail)
        write_text(unfinished / "entry.json", json.dumps(asdict(entry), indent=1))
        if entry.folder.exists():  # damaged
            shutil.rmtree(entry.folder)
        retry_while_locked(lambda: unfinished.replace(entry.folder))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_adapter(place: Path, folder: Path) -> None:
    """A copy of an adapter, a folder or a file, in a new folder."""
    folder.mkdir(parents=True)
    if place.is_dir():
        shutil.copytree(place, folder / "adapter")
    elif (
        place.parent / CONFIG
    ).is_file() and place.name == WEIGHTS:  # a PEFT folder's file means nothing without its config
        (folder / "adapter").mkdir()
        shutil.copy(place, folder / "adapter" / WEIGHTS)
        shutil.copy(place.parent / CONFIG, folder / "adapter" / CONFIG)
    else:
        shutil.copy(place, folder / "adapter.safetensors")


def load_thumbnail(path: Path) -> Image.Image:
    """The image, small.

    Raises:
        UserError: when it is none.
    """
    try:
        with open_image(path) as image:
            small = image.convert("RGB")
    except OSError as error:
        raise UserError(f"--thumbnail {path} is not an image that can be read.") from error
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return small


def newest_preview(run: Path) -> Path | None:
    """The newest preview of a run folder."""
    images = sorted((run / "samples").glob("*.png"))
    return images[-1] if images else None


def entries() -> list[Entry]:
    """All adapters of the library, by name, but for damaged ones."""
    found = (read_entry(folder) for folder in sorted(library_folder().glob("*/")))
    return [entry for entry in found if entry is not None]


def read_entry(folder: Path) -> Entry | None:
    """What a folder of the library says of its adapter; None where it says nothing that can be read, or the adapter is gone."""
    entry = as_type(Entry, read_record(folder / "entry.json"))
    whole = any((folder / name).exists() for name in ("adapter", "adapter.safetensors"))
    return entry if entry is not None and entry.name == folder.name and whole else None


def damaged_entries() -> list[str]:
    """Names of folders in the library that hold no whole entry, as an addition that was killed leaves them."""
    folders = sorted(path for path in library_folder().glob("*/") if not path.name.startswith("."))
    return [folder.name for folder in folders if read_entry(folder) is None]


def get(name: str) -> Entry:
    """One adapter.

    Raises:
        UserError: when the library does not have it, with the nearest name.
    """
    known = {entry.name: entry for entry in entries()}
    if name in damaged_entries():
        raise UserError(f"{library_folder() / name} is damaged or half written: delete it and add the adapter again.")
    if not known:
        raise UserError(f"The library is empty, so there is no {name} in it: add one with 'rankfold library add PATH'.")
    if name not in known:
        raise UserError(f"The library has no {name}.{did_you_mean(name, known)}")
    return known[name]


def resolve(text: str) -> Path:
    """The adapter behind a path or a name in the library.

    Raises:
        UserError: when it is neither.
    """
    path = expand_user(Path(text))
    return path if path.exists() or is_path(text) else get(text).path
