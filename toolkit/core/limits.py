"""Limits of settings, which stand in their types (annotated_types): Annotated[int, Ge(1)] is a number from 1 on."""

from __future__ import annotations

import operator
from math import isfinite
from typing import Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from .errors import UserError
from .setting_names import as_flag

WORDS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}
LARGEST = 2**63 - 1  # a whole number that torch, and the files that we write, hold


def check_limits(settings: Any, kind: Any = None) -> None:
    """Checks every field of a dataclass against the limits in its type; numbers must be finite, and texts be text.

    kind: the class that the types stand in, where it is another than the settings' own.

    Raises:
        UserError: naming the first field that is out of range, as the command line calls it.
    """
    for name, hint in get_type_hints(kind or type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for one in values_in(value):
            if isinstance(one, str) and not is_text(one):
                raise UserError(f"{as_flag(name)} {one[:80]!a} holds bytes that are no text.")
            if isinstance(one, float) and not isfinite(one):
                raise UserError(f"{as_flag(name)} must be a finite number, not {one}.")
            if isinstance(one, int) and abs(one) > LARGEST:
                raise UserError(f"{as_flag(name)} must be at most {LARGEST}, not {one}.")
            if fault := limit_fault(one, constraints(hint)):
                raise UserError(f"{as_flag(name)} must be {fault}, not {one}.")


def is_text(text: str) -> bool:
    """Whether a text can be written; what was no text on a command line cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def values_in(value: Any) -> list[Any]:
    """The numbers and texts that a field holds: its value, or those in it."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, tuple | list) else [value]


def constraints(hint: Any) -> list[Any]:
    """The limits in a field's type: of Annotated[int, Ge(1)], or of the number in Annotated[int, Ge(1)] | None."""
    options = [hint, *get_args(hint)]
    return [limit for option in options for limit in getattr(option, "__metadata__", ()) if type(limit) in WORDS]


def limit_fault(value: Any, limits: list[Any]) -> str:
    """What a value must be, when it is not within its limits; '' when it is, or when it is unset."""
    if value is None or isinstance(value, str):
        return ""
    bounds = {type(limit): getattr(limit, WORDS[type(limit)][0]) for limit in limits}
    within = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}
    broken = [kind for kind, bound in bounds.items() if not within[kind](value, bound)]
    if broken and Lt in bounds:
        return f"in {'[' if Ge in bounds else '('}0, {bounds[Lt]})"
    return f"{WORDS[broken[0]][1]} {bounds[broken[0]]}" if broken else ""
