"""The queue: run folders that wait, and workers that take the oldest, one run at a time for each device.

A queued run is a folder with a config and the state 'queued'; nothing else knows of it, so it outlives whoever put it there. A worker
starts each run as a process of its own, which goes on when the worker, or the page that asked for it, is gone.

torch is imported where a run is checked or carried out only: a worker waits for hours, and is small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import HOST, LIVE, Run, born, is_alive
from ...toolkit.core.systems import on_its_own, patiently, remove
from ..config.base import LoopConfig
from ..config.yaml_file import from_yaml, to_yaml
from ..runs.begin import check_out, clear

LOOK = 1.0  # seconds between looks for queued runs
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")  # which device a process sees: of kind cuda, of kind xpu
OUTPUT = "output.txt"  # what a run's process prints


def runs_in(root: Path) -> list[Run]:
    """The runs below a folder, the newest first; folders that hold anything else are passed over."""
    found = [Run(path) for path in root.iterdir() if (path / "config.yaml").is_file()] if root.is_dir() else []
    return sorted(found, key=lambda run: run.config_file.stat().st_mtime, reverse=True)


def enqueue(config: LoopConfig, *, overwrite: bool = False) -> Run:
    """A new run folder that waits for a worker.

    overwrite: deletes the run that is in the folder.

    Raises:
        UserError: for a folder that holds a run or anything else, and for everything that can be checked before a model is loaded.
    """
    run = Run(config.out)
    check_out(config, overwrite=overwrite)
    if not run.is_run() and run.others_entries():
        raise UserError(f"{run.folder} is there already: choose another name.")
    from .start import check

    check(config)
    clear(run)
    run.let_go()
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.config_file, to_yaml(config))
    run.set_status(state="queued", queued=time.time(), step=0, total=config.steps, error=None)
    return run


def enqueue_again(run: Run, *, accept_changes: bool = False) -> None:
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
    remove(run.folder / "claim.json")
    run.set_status(state="queued", queued=time.time(), error=None)


def withdraw(run: Run) -> None:
    """Takes a waiting run out of the queue; a run at work is asked to stop behind this step."""
    if run.state() == "queued":
        run.set_status(state="stopped")
    else:
        run.ask("stop")


def waiting(root: Path) -> list[Run]:
    """Runs that wait, the oldest first."""
    found = [run for run in runs_in(root) if run.status().get("state") == "queued"]
    return sorted(found, key=lambda run: run.status().get("queued", 0.0))


# ---------------------------------------------------------------------------------------------- workers


def work(root: Path, device: str = "0", *, until_empty: bool = False) -> int:
    """Carries out queued runs, one after another; returns how many were started.

    device: the number of the device that they see; without a GPU any name does. until_empty: come back when none waits.

    Raises:
        UserError: when a worker of this device is at work here already.
    """
    started = 0
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".worker-{device}.json", f"A worker for device {device} is at work in {root} already."):
        while True:
            busy = any(run.state() in LIVE and run.status().get("device") == device for run in runs_in(root))
            run = None if busy else next((run for run in waiting(root) if claim(run)), None)
            if run is not None:
                started += 1
                carry_out(run, device)
            elif until_empty and not busy:
                return started
            else:
                time.sleep(LOOK)


def claim(run: Run) -> bool:
    """Makes a waiting run this worker's; False when another worker was quicker."""
    file = run.folder / "claim.json"
    if file.is_file() and not holder_lives(file):
        remove(file)
    if not take(file):
        return False
    if run.status().get("state") == "queued":
        return True
    remove(file)  # it was withdrawn, or another worker has carried it out since
    return False


def carry_out(run: Run, device: str) -> None:
    """Starts a run as a process of its own and waits for its end."""
    run.set_status(device=device)  # the run's own process says that it is starting
    environment = (
        os.environ | {name: device for name in VISIBLE} | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    )
    with (run.folder / OUTPUT).open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "rankfold.training.launch.run_queued", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            **on_its_own(),
        )
    code = child.wait()
    remove(run.folder / "claim.json")
    if code > 0 and run.status().get("state") not in ("failed", "stopped", "done") and not run.is_live():
        run.set_status(state="failed", error=last_line(run.folder / OUTPUT))


def carry_on(folder: Path) -> None:
    """What the process of a queued run does: begins it, or goes on from its newest checkpoint."""
    run = Run.open(folder)
    try:
        from_yaml(run.config_file)  # before the import, which takes long, for it may be broken
        from .start import resume

        resume(folder)
    except UserError as error:
        # A worker that was killed may have left a process that has the run by now: it has not failed.
        others = run.is_live() and run.status().get("pid") != os.getpid()
        if not others and run.status().get("state") != "failed":
            run.set_status(state="failed", error=str(error))
        raise


def last_line(file: Path) -> str:
    """The last line that a process printed."""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:500] if lines else "ended without a word"


def workers(root: Path) -> list[str]:
    """Devices that a living worker serves."""
    return [file.stem.removeprefix(".worker-") for file in root.glob(".worker-*.json") if holder_lives(file)]


def start_worker(root: Path, device: str = "0") -> None:
    """Starts a worker as a process of its own, unless one is there."""
    if device in workers(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".worker.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "rankfold.training.launch.worker", str(root), device],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **on_its_own(),
        )


# ---------------------------------------------------------------------------------------------- locks


def take(file: Path) -> bool:
    """Makes a file that says who has it; False when it is there. Only one of several processes succeeds."""
    own = {"pid": os.getpid(), "born": born(os.getpid()), "host": HOST, "beat": time.time()}
    try:
        with file.open("x", encoding="utf-8") as opened:
            json.dump(own, opened)
    except FileExistsError:
        return False
    return True


def holder_lives(file: Path) -> bool:
    """Whether the process that made a lock file is there; half a file counts as a lock that is just being made."""
    try:
        return is_alive(json.loads(patiently(lambda: file.read_text(encoding="utf-8"))))
    except json.JSONDecodeError:
        return time.time() - file.stat().st_mtime < 5
    except OSError:
        return False


@contextmanager
def locked(file: Path, taken: str) -> Any:
    """Holds a lock file; one that a dead process left is taken over.

    Raises:
        UserError: with the sentence `taken` when another living process holds it.
    """
    if file.is_file() and not holder_lives(file):
        remove(file)
    if not take(file):
        raise UserError(taken)
    try:
        yield
    finally:
        remove(file)
