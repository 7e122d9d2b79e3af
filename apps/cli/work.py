"""`rankfold work`: queued runs, carried out one after another by a worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import parse_options


@dataclass(frozen=True)
class WorkOptions:
    runs: Path = Path("runs")
    """Folder with the runs."""
    device: str = "0"
    """Number of the GPU that this worker's runs see; one worker for each. Without a GPU any name does."""
    until_empty: bool = False
    """Exit when the queue is empty."""


def work(argv: list[str]) -> None:
    options = parse_options(WorkOptions, argv, "work")
    from ...training.launch.queue import run_worker as drain

    print(f"Taking queued runs from {options.runs} for device {options.device}; Ctrl-C ends this, not the run at work.")
    started = drain(options.runs, options.device, until_empty=options.until_empty)
    print(f"{started} runs were carried out; none waits.")
