"""Files written whole or not at all."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import UserError
from .systems import replace_file


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all: beside its name, flushed to the disk, then renamed.

    Raises:
        UserError: when the disk is full or cannot be written; the file that was there before stays as it was.
    """
    if not path.name:
        raise UserError(f"'{path}' is a folder, and a file is to be written: give its name.")
    check_replaceable(path)
    temporary = path.with_name(
        f".{path.name}.{uuid4().hex[:12]}.tmp"
    )  # two containers may have the same process number
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"Could not write {path}: {error.strerror or error}. Free some space or choose another --out; "
            "what was written before is whole."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Raises UserError for a device, a pipe or a socket, such as /dev/null: by a new file of its name it would be gone."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # these raise for no name
        raise UserError(f"{path} is no file but a device, a pipe or a socket: give the name of a file.")


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries on the disk, where the system can: without it a new name may be lost with the power."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, after a whole one even if a killed process left half a line at the end."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(f"{line}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        UserError: as `write_atomic` does, and for a name of a file in it that is no text.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Could not write {path}: {text[max(error.start - 40, 0) : error.end + 40]!a} holds a character that is no text. "
            "Rename that file or folder."
        ) from error
    write_atomic(path, data)


def write_png(path: Path, image: Image.Image, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically, with text chunks if given."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    write_atomic(path, buffer.getbuffer())
