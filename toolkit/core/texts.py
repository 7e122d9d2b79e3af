"""Text files that people wrote, with whatever editor."""

from __future__ import annotations

import codecs
from pathlib import Path

from .errors import UserError


def read_text(path: Path) -> str:
    """A text in UTF-8, with the mark that some editors put at its start or without, or in UTF-16; lines end with \\n.

    Raises:
        UserError: for a text in another encoding, or what is no text.
        OSError: when the file cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        return decode(raw, path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8: byte {error.start} cannot be read. Save it as UTF-8, as every editor can."
        ) from error


def decode_text(path: Path) -> tuple[str, str]:
    """A text as `read_text` reads it, or else in Windows' code page 1252, and then that encoding's name; '' where none was guessed.

    Raises:
        UserError: for what is neither.
        OSError: when the file cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        return decode(raw, path), ""
    except UnicodeDecodeError:
        try:
            return unify_line_ends(raw.decode("cp1252")), "Windows-1252"
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text in UTF-8: save it as UTF-8, as every editor can.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of such a text, without their ends."""
    return read_text(path).split("\n")


def decode(raw: bytes, path: Path) -> str:
    """Bytes as text; raises UnicodeDecodeError for another encoding, UserError for null bytes, which no text has."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in raw:
        encoding = guess_utf16(raw)
    text = unify_line_ends(raw.decode(encoding))
    if "\0" in text:
        raise UserError(f"{path} holds null bytes, which no text has: save it as UTF-8, as every editor can.")
    return text


def guess_utf16(raw: bytes) -> str:
    """The byte order of UTF-16 without a mark, whose every other byte is null in Western texts; UTF-8 where it is not that."""
    even, odd = raw[::2].count(0), raw[1::2].count(0)
    if len(raw) % 2 or min(even, odd) or max(even, odd) * 4 < len(raw):
        return "utf-8-sig"
    return "utf-16-le" if odd else "utf-16-be"


def unify_line_ends(text: str) -> str:
    """The text with every line's end as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
