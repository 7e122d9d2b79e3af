"""Files written whole or not at all."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import UserError
from .systems import replace_file


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all: beside its name, flushed to the disk, then renamed.

    Raises:
        UserError: when the disk is full or cannot be written; the file that was there before stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
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


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, after a whole one even if a killed process left half a line at the end."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(f"{line}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomic(path, text.encode())


def write_png(path: Path, image: Image.Image, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically, with text chunks if given."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    write_atomic(path, buffer.getbuffer())
