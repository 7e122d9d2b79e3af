"""`rankfold stop`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import parse_options, positional


def stop(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""

    from ...toolkit.core.run_folder import Run

    run = Run.open(parse_options(Options, argv, "stop").run)
    run.request("stop")
    print(f"{run.folder} will write a checkpoint and stop after this step.")
