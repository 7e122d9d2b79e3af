"""How a run ended, as every command that runs one says it."""

from __future__ import annotations

from pathlib import Path

from .options import is_main_process


def print_outcome(folder: Path, then: str = "") -> None:
    """Says how a run ended and what can be done with it. then: the next command."""
    from ...toolkit.core.run_folder import Run

    if not is_main_process():
        return
    status = Run(folder).status()
    if status["state"] == "stopped":
        print(f"Stopped at step {status['step']}; a checkpoint is kept. Go on with: rankfold resume {folder}")
    else:
        print(f"Done: {folder / 'adapter'}\nNext: {then or f'rankfold sample --run {folder} --n 4 --grid'}")
