"""`rankfold report`: runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...toolkit.core.errors import UserError
from .options import parse_options, positional


def report(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        runs: Annotated[tuple[Path, ...], positional()]
        """Run folders."""
        out: Path = Path("report.html")
        """The page."""

    options = parse_options(Options, argv, "report")
    if not options.runs:
        raise UserError("Name at least one run folder.")
    from ...toolkit.core.files import write_text
    from ...training.evaluation.report import runs_page as made

    write_text(options.out, made(options.runs))
    print(options.out)
