"""`python -m rankfold.training.launch.worker RUNS DEVICE`: a worker in the background, as the studio starts one."""

from __future__ import annotations

import sys
from pathlib import Path

from ...toolkit.core.terminal import report_errors
from .queue import run_worker


def main(arguments: list[str]) -> None:
    """Runs the queued runs of a folder, one after another, for a device, until it is killed."""
    with report_errors():
        run_worker(Path(arguments[0]), arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
