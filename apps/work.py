"""`rankfold work`: queued runs, carried out one after another; and `python -m rankfold.apps.work RUN`, one of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..toolkit.errors import UserError
from .options import parse, positional
from .terminal import plain_end


@dataclass(frozen=True)
class WorkOptions:
    runs: Path = Path("runs")
    """Folder with the runs."""
    device: str = "0"
    """Number of the GPU that this worker's runs see; one worker for each. Without a GPU any name does."""
    until_empty: bool = False
    """Come back when no run waits."""


def work(words: list[str]) -> None:
    options = parse(WorkOptions, words, "work")
    from ..training.queue import work as drain

    print(f"Taking queued runs from {options.runs} for device {options.device}; Ctrl-C ends this, not the run at work.")
    started = drain(options.runs, options.device, until_empty=options.until_empty)
    print(f"{started} runs were carried out; none waits.")


def queue(words: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        config: Annotated[Path, positional()]
        """Config file (YAML), as every run folder holds one."""
        out: Path | None = None
        """Run folder; unset means the config's."""
        overwrite: bool = False
        """Delete the run that the folder holds."""

    from dataclasses import replace

    options = parse(Options, words, "queue")
    from ..training.config import from_yaml
    from ..training.queue import enqueue

    config = from_yaml(options.config)
    run = enqueue(replace(config, out=options.out or config.out), overwrite=options.overwrite)
    print(f"{run.folder} waits. Carry it out with: rankfold work --runs {run.folder.parent}")


def main(arguments: list[str]) -> None:
    """Carries one queued run out. Exit codes as in apps/cli.py."""
    from ..toolkit.runs import Run

    with plain_end():
        run = Run.open(Path(arguments[0]))
        if run.state() != "queued":  # a worker that was killed may have left a process that has the run
            raise UserError(f"{run.folder} is {run.state() or 'no run'} and does not wait.")
        run.claim()  # before anything heavy is loaded
        from ..training.queue import carry_on

        carry_on(run.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
