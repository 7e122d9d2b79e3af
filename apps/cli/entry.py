"""The command line: `rankfold ...`.

Each command lies in a file of its own, and imports heavy libraries itself, so that help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...toolkit.core.errors import UserError, nearest
from ...toolkit.core.terminal import plain_end
from .commands import COMMANDS


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("rankfold")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, and those of `plain_end`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--verbose"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] in ("-V", "--version"):
        print(f"rankfold {version()}")
        return
    with plain_end(verbose=len(words) < len(given)):
        run_command(words)


def overview() -> str:
    """The text of `rankfold --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: rankfold COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nrankfold COMMAND --help says more, and --verbose what the libraries have to say."
    )


def run_command(words: list[str]) -> None:
    """Finds the command, reads its options and runs it."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        two = [command for command in COMMANDS if command.startswith(f"{words[0]} ")]
        if two:
            raise UserError(f"'{words[0]}' needs one more word: {', '.join(two)}.")
        raise UserError(f"there is no command '{words[0]}'.{nearest(words[0], COMMANDS)}")
    COMMANDS[name](words[len(name.split()) :])
