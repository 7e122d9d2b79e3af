"""Names of settings: as options of the command line, and former ones, which are read wherever users still hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .errors import UserError

RENAMED = {
    "token_vectors": "num_vectors",
    "shorten": "truncate",
    "adapt": "target_parts",
    "prior_pictures": "prior_images",
    "side": "width",
}
"""Old name -> the one it has now."""


def current_names(values: Mapping[str, Any], known: Collection[str], place: str) -> dict[str, Any]:
    """The values under the names that settings have now. known: those names; place: where the values stand, for the error.

    Raises:
        UserError: where an old name and the one it has now are both given.
    """
    renamed = {}
    for key, value in values.items():
        name = current_name(key, known)
        if name != key and name in values:
            raise UserError(f"{place}: '{key}' is the former name of '{name}', and both are given: remove '{key}'.")
        renamed[name] = value
    return renamed


def current_name(name: str, known: Collection[str]) -> str:
    """The name that a setting has now, where it is among those that are known."""
    return new if (new := RENAMED.get(name)) in known else name  # type: ignore[return-value]


def as_flag(name: str) -> str:
    """A setting as the command line has it."""
    return "--" + name.replace("_", "-")
