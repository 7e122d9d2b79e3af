"""`python -m rankfold.training.launch.run_queued RUN`: the process of one queued run, started by a worker."""

from __future__ import annotations

import sys
from pathlib import Path

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.core.terminal import report_errors


def main(arguments: list[str]) -> None:
    """Runs one queued run to its end. Exit codes as those of the command line."""
    with report_errors():
        run = Run.open(Path(arguments[0]))
        run.lock()  # before anything heavy is loaded
        if run.state() != "queued":  # a worker that was killed may have left a process that had the run
            raise UserError(f"{run.folder} is {run.state() or 'no run'} and does not wait.")
        run.claim()
        from .queue import run_queued

        run_queued(run.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
