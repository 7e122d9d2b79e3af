"""`rankfold report`: runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...toolkit.core.errors import UserError
from .options import parse, positional


def report(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        runs: Annotated[tuple[Path, ...], positional()]
        """Run folders."""
        out: Path = Path("report.html")
        """The page."""

    options = parse(Options, words, "report")
    if not options.runs:
        raise UserError("Name at least one run folder.")
    from ...toolkit.core.files import write_text
    from ...training.evaluation.report import report as made

    write_text(options.out, made(options.runs))
    print(options.out)
