"""Data sets with a share, as --more-data names them: FILE or FILE=SHARE."""

from __future__ import annotations

import math
from pathlib import Path

from ...toolkit.core.errors import UserError
from ...toolkit.core.paths import expand_user, is_there


def split_share(text: str) -> tuple[str, str]:
    """The file, and its share with the sign before it ("=0.5"), "" where none is given.

    A file that is there by the whole text has no share, whatever its name.
    """
    name, equals, share = text.rpartition("=")
    if not equals or is_there(expand_user(Path(text))):
        return text, ""
    return name, equals + share


def parse_share(text: str) -> tuple[Path, float]:
    """The file and the share of one entry, 1 where none is given.

    Raises:
        UserError: for a share that is no number above 0.
    """
    file, share = split_share(text)
    try:
        value = float(share[1:] or 1) if share != "=" else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"--more-data {text}: the share behind = must be a number above 0, such as 0.5 or 2.")
    return expand_user(Path(file)), value
