"""Text files that people wrote, with whatever editor."""

from __future__ import annotations

import codecs
from pathlib import Path

from .errors import UserError


def read_text(path: Path) -> str:
    """A text in UTF-8, with the mark that some editors put at its start or without, or in UTF-16 with one; lines end with \\n.

    Raises:
        UserError: for a text in another encoding.
        OSError: when the file cannot be read.
    """
    raw = Path(path).read_bytes()
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8: byte {error.start} cannot be read. Save it as UTF-8, as every editor can."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of such a text, without their ends."""
    return read_text(path).split("\n")
