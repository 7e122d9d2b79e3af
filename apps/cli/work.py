"""`rankfold work`: queued runs, carried out one after another by a worker, and `rankfold queue`: runs put there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import parse, positional


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
    from ...training.launch.queue import work as drain

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
    from ...training.config.yaml_file import from_yaml
    from ...training.launch.queue import enqueue

    config = from_yaml(options.config)
    run = enqueue(replace(config, out=options.out or config.out), overwrite=options.overwrite)
    print(f"{run.folder} waits. Carry it out with: rankfold work --runs {run.folder.parent}")
