"""Numbers from boxes: what each may be at least and at most, said in one place for all pages."""

from __future__ import annotations

import math
import random
from typing import Any

from ....toolkit.core.errors import UserError

MAX_SEED = 2**32 - 1
LIMITS = {  # least, most, whether whole
    "strength": (-10, 10, False), "seed": (0, MAX_SEED, True), "guidance": (0, 100, False), "steps": (1, 1000, True),
    "image strength": (0.01, 1, False), "width": (0, 4096, True), "height": (0, 4096, True),
}  # fmt: skip


def parse_number(what: str, value: Any) -> Any:
    """A number of a box or of an axis.

    Raises:
        UserError: naming what is not a such number.
    """
    least, most, whole = LIMITS[what]
    try:
        found = float(str(value).replace("_", "?"))  # Python alone reads 1_000 as a number
    except ValueError:
        found = math.nan
    if not least <= found <= most or (whole and found != int(found)):
        kind = "a whole number" if whole else "a number"
        shown = "An empty box" if value in (None, "") else repr(str(value)[:60])
        raise UserError(f"{shown} does not fit as {what}: give {kind} from {least} to {most}.")
    return int(found) if whole else found


def parse_seed(value: Any) -> int:
    """The seed of a box, where -1 is a random one."""
    return random.randrange(2**31) if value == -1 else parse_number("seed", value)


def whole(label: str, value: float | None) -> int:
    """The whole number of a box; 0 for an empty one.

    Raises:
        UserError: for any other number.
    """
    if value is None:
        return 0
    if not math.isfinite(value) or value != int(value):
        raise UserError(f"{label} must be a whole number, not {value:g}.")
    return int(value)
