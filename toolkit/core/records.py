"""Records in JSON that processes leave for each other: one that is damaged is as if it were not there."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import UserError
from .systems import retry_while_locked

Record = TypeVar("Record")


def parse_record(text: str | bytes) -> dict[str, Any] | None:
    """An object in JSON; None for half of one, and for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or no text
        return None
    return found if isinstance(found, dict) else None


def read_record(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        return parse_record(retry_while_locked(file.read_bytes))
    except OSError:
        return None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a file with one in each line."""
    try:
        lines = retry_while_locked(file.read_bytes).splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := parse_record(line)) is not None]


def as_type(kind: type[Record], values: dict[str, Any] | None) -> Record | None:
    """The values as a dataclass; None where they are not those of one."""
    try:
        return None if values is None else TypeAdapter(kind).validate_python(values)
    except (ValidationError, TypeError, RecursionError):
        return None


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:
        return False


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: when the text is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({' '.join(str(error).split())[:120]}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not {shorten(value)}.")
    return value


def shorten(value: Any) -> str:
    """A value for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
