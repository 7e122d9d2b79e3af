"""What stands on the terminal: our own words, in whatever letters it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..toolkit.errors import UserError
from ..toolkit.shortage import as_shortage, general_cure, is_shortage


@contextmanager
def plain_end() -> Iterator[None]:
    """Within, what a user can cause ends the program in one sentence. Exit codes: 2 a mistake or a lack of memory, 130 interrupted."""
    any_letters()
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if is_shortage(error):
            error = as_shortage(error, "this was done", general_cure)
        if not isinstance(error, UserError):
            raise
        print(f"rankfold: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def any_letters() -> None:
    """Prints ? for a letter that the console's encoding lacks (cp1252, ASCII), in the place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
