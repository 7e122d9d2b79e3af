"""Rows in the one form that is read: names in lower case, lists that tables hold as text, turns and images that lie in columns.

Nothing of a row's texts is changed: a cell that holds JSON is a list only in a field that is one, and an answer in JSON stays text.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from ..core.errors import UserError
from . import row_fields
from .choices import LETTERS

LISTS = (
    *row_fields.CONVERSATIONS, *row_fields.PAIRS, *row_fields.HISTORY, *row_fields.IMAGES, *row_fields.VIDEOS, *row_fields.OBJECTS,
    "answers", "frames", "video_frames", "image_paths", "image_files",
)  # fmt: skip
KNOWN = frozenset((
    *LISTS, *row_fields.QUESTIONS, *row_fields.ANSWERS, *row_fields.MORE_QUESTION, *row_fields.SYSTEM, *row_fields.CHOICES,
    *row_fields.OTHER_IMAGES, *row_fields.OTHER_VIDEOS, row_fields.FPS,
))  # fmt: skip


def settle_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of any form in ours; one that is in it already is given back as it is.

    Raises:
        UserError: where two fields differ in case alone, and in what they hold.
    """
    settled: dict[str, Any] = {}
    for name, value in row.items():
        plain = plain_name(name)
        if not row_fields.is_empty(settled.get(plain)) and not row_fields.is_empty(value) and settled[plain] != value:
            raise UserError(f"the row gives '{plain}' twice, once as '{name}': leave one out, --columns ignore={name}.")
        if plain not in settled or row_fields.is_empty(settled[plain]):
            settled[plain] = value
    for name in LISTS:
        if name in settled:
            settled[name] = gather_columns(read_list(settled[name]), name)
    gather_options(settled)
    return settled


def plain_name(name: Any) -> Any:
    """A field's name as we write it, where it is one of ours in another case."""
    plain = str(name).strip().lower().replace(" ", "_").replace("-", "_")
    return plain if plain in KNOWN else name


def read_list(value: Any) -> Any:
    """A list or object that is written as text, by JSON or Python; anything else as it is."""
    if not isinstance(value, str) or value[:1] not in ("[", "{") or value.rstrip()[-1:] not in ("]", "}"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def gather_columns(value: Any, name: str) -> Any:
    """A list of objects where there is an object of lists, as tables keep them; only of turns and images."""
    if name not in (*row_fields.CONVERSATIONS, *row_fields.IMAGES) or not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    rows = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [{key: cell for key, cell in row.items() if cell is not None} for row in rows]


def gather_options(row: dict[str, Any]) -> None:
    """Puts options that stand in columns A, B, ... (MMBench's, VLMEvalKit's) into `choices`."""
    asked = any(not row_fields.is_empty(row.get(name)) for name in row_fields.QUESTIONS)
    given = any(not row_fields.is_empty(row.get(name)) for name in row_fields.CHOICES)
    letters = [letter for letter in LETTERS if isinstance(row.get(letter), (str, int, float)) and row[letter] != ""]
    if asked and not given and len(letters) > 1 and letters == list(LETTERS[: len(letters)]):
        row["choices"] = {letter: row.pop(letter) for letter in letters}
