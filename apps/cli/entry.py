"""The command line: `rankfold ...`.

Each command lies in a file of its own, and imports heavy libraries itself, so that help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...toolkit.core.errors import UserError, did_you_mean
from ...toolkit.core.terminal import report_errors
from .commands import COMMANDS


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("rankfold")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, and those of `report_errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    argv = [word for word in given if word != "--verbose"]
    with report_errors(verbose=len(argv) < len(given)):
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(overview())
        elif argv[0] in ("-V", "--version"):
            print(f"rankfold {version()}")
        else:
            run_command(argv)


def overview() -> str:
    """The text of `rankfold --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: rankfold COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nrankfold COMMAND --help says more, and --verbose what the libraries have to say."
    )


def run_command(argv: list[str]) -> None:
    """Finds the command, reads its options and runs it."""
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if name not in COMMANDS:
        two = [command for command in COMMANDS if command.startswith(f"{argv[0]} ")]
        if two:
            raise UserError(f"'{argv[0]}' needs one more word: {', '.join(two)}.")
        raise UserError(f"there is no command '{argv[0]}'.{did_you_mean(argv[0], COMMANDS)}")
    COMMANDS[name](argv[len(name.split()) :])
