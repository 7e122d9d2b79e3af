"""What stands on the terminal: our own words, in whatever letters it has."""

from __future__ import annotations

import sys


def any_letters() -> None:
    """Prints ? for a letter that the console's encoding lacks (cp1252, ASCII), in the place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
