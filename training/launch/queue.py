"""The queue: run folders that wait, and workers that take the oldest, one run at a time for each device.

A queued run is a folder with a config and the state 'queued'; nothing else knows of it, so it outlives whoever put it there. A worker
starts each run as a process of its own, which goes on when the worker, or the page that asked for it, is gone.

torch is imported where a run is checked or carried out only: a worker waits for hours, and is small.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...toolkit.core import locks
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import LIVE_STATES, Run
from ...toolkit.core.systems import detached_process_kwargs
from ..config.base import LoopConfig
from ..config.yaml_file import from_yaml, to_yaml
from ..runs.begin import check_out, clear_folder, with_absolute_paths

POLL_SECONDS = 1.0  # seconds between looks for queued runs
DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)  # which device a process sees: of kind cuda, of kind xpu
WORKER = ".worker-"  # the lock file of a device's worker, before the device
OUTPUT_FILE = "output.txt"  # what a run's process prints


def list_runs(root: Path) -> list[Run]:
    """The runs below a folder, the newest first; folders that hold anything else are passed over."""
    found = [Run(path) for path in root.iterdir() if (path / "config.yaml").is_file()] if root.is_dir() else []
    return sorted(found, key=lambda run: run.config_file.stat().st_mtime, reverse=True)


def check_runs_folder(folder: Path) -> None:
    """Makes the folder with the runs.

    Raises:
        UserError: when it is no folder, or cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--runs {folder} is a file: give a folder, or a name that is not there yet.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs {folder} cannot be made: {error.strerror or error}. Give another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--runs {folder} cannot be written: give another folder.")


def enqueue(config: LoopConfig, *, overwrite: bool = False) -> Run:
    """A new run folder that waits for a worker.

    overwrite: deletes the run that is in the folder.

    Raises:
        UserError: for a folder that holds a run or anything else, and for everything that can be checked before a model is loaded.
    """
    run = Run(config.out)
    check_out(config, overwrite=overwrite)
    if not run.is_run() and run.foreign_entries():
        raise UserError(f"{run.folder} is there already: choose another name.")
    from ..config.defaults import resolve_defaults
    from .start import check_config

    check_config(config)
    resolved = resolve_defaults(config)
    with run.locked():
        check_out(config, overwrite=overwrite)  # another run may have come meanwhile
        clear_folder(run)
        run.discard_aside()
        write_text(run.config_file, to_yaml(with_absolute_paths(resolved)))
        run.set_status(state="queued", queued=time.time(), step=0, total=resolved.steps, error=None)
    return run


def requeue(run: Run, *, accept_changes: bool = False) -> None:
    """Puts a run that was stopped, has failed or was lost at the end of the queue; it goes on from its newest checkpoint.

    accept_changes: also where its data have changed, see `resume`.

    Raises:
        UserError: when it is done, waiting or at work, and for everything that can be checked before a model is loaded.
    """
    state = run.state()
    if state not in ("stopped", "failed", "lost"):
        raise UserError(f"{run.folder} is {state or 'no run'}: only a run that was stopped, failed or lost can go on.")
    from .start import check_resume

    check_resume(run.folder, accept_changes=accept_changes)
    run.set_status(state="queued", queued=time.time(), error=None)


def withdraw(run: Run) -> None:
    """Takes a waiting run out of the queue; a run at work is asked to stop after this step."""
    if run.state() == "queued":
        run.set_status(state="stopped")
    else:
        run.request("stop")


def run_next(run: Run) -> None:
    """Puts a waiting run at the head of the queue.

    Raises:
        UserError: when it does not wait.
    """
    if run.state() != "queued":
        raise UserError(f"{run.folder} does not wait in the queue: it is {run.summary()}.")
    first = queued_runs(run.folder.parent)[0]
    run.set_status(queued=first.status().get("queued", 0.0) - 1.0)


def queued_runs(root: Path) -> list[Run]:
    """Runs that wait, the oldest first."""
    found = [run for run in list_runs(root) if run.status().get("state") == "queued"]
    return sorted(found, key=lambda run: run.status().get("queued", 0.0))


# ---------------------------------------------------------------------------------------------- workers


def run_worker(root: Path, device: str = "0", *, until_empty: bool = False) -> int:
    """Carries out queued runs, one after another; returns how many were started.

    device: the number of the device that they see; without a GPU any name does. until_empty: exit when the queue is empty.

    Raises:
        UserError: for a device that is no name, and when a worker of this device is at work here already.
    """
    if not re.fullmatch(r"[\w.,:-]+", device):
        raise UserError(
            f"--device {device!r} is no device: give the number of a GPU, such as 0, or any word without one."
        )
    started = 0
    check_runs_folder(root)
    with hold_lock(root / f"{WORKER}{device}.lock", f"A worker for device {device} is at work in {root} already."):
        while True:
            busy = any(run.state() in LIVE_STATES and run.status().get("device") == device for run in list_runs(root))
            run = None if busy else next((run for run in queued_runs(root) if claim_run(run)), None)
            if run is not None:
                started += 1
                spawn_run(run, device)
            elif until_empty and not busy:
                return started
            else:
                time.sleep(POLL_SECONDS)


def claim_run(run: Run) -> bool:
    """Makes a waiting run this worker's; False when another worker was quicker."""
    try:
        taken = locks.acquire(run.claim_file)
    except OSError:  # deleted meanwhile, or not ours to write
        return False
    if taken and run.status().get("state") == "queued":
        return True
    if taken:  # it was withdrawn, or another worker has carried it out since
        locks.release(run.claim_file)
    return False


def spawn_run(run: Run, device: str) -> None:
    """Starts a run as a process of its own and waits for its end."""
    run.set_status(device=device)  # the run's own process says that it is starting
    turn = run.status().get("queued")
    environment = (
        os.environ
        | {name: device for name in DEVICE_VARIABLES}
        | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    )
    with (run.folder / OUTPUT_FILE).open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "rankfold.training.launch.run_queued", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            **detached_process_kwargs(),
        )
    code = child.wait()
    locks.release(run.claim_file)
    ended = ("failed", "stopped", "done")
    if code > 0 and is_turn(run, turn) and run.status().get("state") not in ended and not run.is_live():
        run.set_status(state="failed", error=last_line(run.folder / OUTPUT_FILE))


def is_turn(run: Run, turn: Any) -> bool:
    """Whether the run still has this turn: one that was lost may be in the queue again before its process has ended."""
    return run.status().get("queued") == turn


def run_queued(folder: Path) -> None:
    """What the process of a queued run does: begins it, or goes on from its newest checkpoint."""
    run = Run.open(folder)
    turn = run.status().get("queued")
    try:
        from_yaml(run.config_file)  # before the import, which takes long, for it may be broken
        from .start import resume

        resume(folder)
    except UserError as error:
        # A worker that was killed may have left a process that has the run by now: it has not failed.
        others = run.is_live() and run.status().get("pid") != os.getpid()
        if not others and is_turn(run, turn) and run.status().get("state") != "failed":
            run.set_status(state="failed", error=str(error))
        raise


def last_line(file: Path) -> str:
    """The last line that a process printed."""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:500] if lines else "stopped unexpectedly"


def live_workers(root: Path) -> list[str]:
    """Devices that a living worker serves."""
    return [file.stem.removeprefix(WORKER) for file in root.glob(f"{WORKER}*.lock") if locks.is_held(file)]


def start_worker(root: Path, device: str = "0") -> None:
    """Starts a worker as a process of its own, unless one is there."""
    if device in live_workers(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".worker.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "rankfold.training.launch.worker", str(root), device],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **detached_process_kwargs(),
        )


@contextmanager
def hold_lock(file: Path, message: str) -> Iterator[None]:
    """Holds a lock file.

    Raises:
        UserError: with the sentence `message` when another process holds it.
    """
    if not locks.acquire(file):
        raise UserError(message)
    try:
        yield
    finally:
        locks.release(file)
