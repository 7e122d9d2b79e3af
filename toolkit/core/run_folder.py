"""The run folder: the one place where trainer, command line and app meet.

    runs/<id>/ config.yaml  status.json  data.json  summary.json  metrics.jsonl  log.txt  samples/  checkpoints/  adapter/  requests/

States: queued -> starting -> running -> done, stopped or failed; lost is one whose process is gone without saying so.

Everything is written whole or not at all: a file is written beside its final name, flushed, and renamed. A folder is one run: what
an earlier one has left there is out of sight before the next one writes its first file.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from . import locks
from .errors import UserError
from .files import write_text
from .records import is_number, read_rows
from .systems import remove_file, replace_file, retry_while_locked

LIVE_STATES = ("starting", "running")
STATES = ("queued", *LIVE_STATES, "done", "stopped", "failed")
RUN_ENTRIES = (
    "config.yaml", "status.json", "data.json", "summary.json", "metrics.jsonl", "log.txt", "output.txt",
    "samples", "checkpoints", "adapter", "requests", "measured", "measured.jsonl", "choice.json", "folds",
    "candidates.jsonl", "best.yaml", "structure.txt", "pareto.png", "export", "evaluation", "metrics.json",
    "pictures.png", "report.html", "report.txt", "evaluation.json", "answers.jsonl", "figures.json",
    "before_after.png", "rankfold",
)  # fmt: skip
"""What runs, and the commands that are given one, write into its folder; the last is a tracker's. All else is somebody's own."""
ASIDE_FOLDER = ".rankfold-overwritten"  # where a run lies that another is about to take the place of
DELETED_FOLDER = ".rankfold-deleted"  # where it lies while it is being deleted
LOCK_FILE, CLAIM_FILE = ".rankfold-lock", ".rankfold-claim"  # held by the run's process; by the worker that starts it
REQUESTS = ("stop", "sample", "save")
HEARTBEAT_TIMEOUTS = {
    "starting": 1800.0,
    "running": 300.0,
}  # seconds without a sign of life after which a run on another machine is lost
HOST = socket.gethostname()
CLOCK_TOLERANCE = 2.0  # seconds by which the same beginning may differ: it is reckoned from the clock


class Run:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.status_file = self.folder / "status.json"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.log_file = self.folder / "log.txt"
        self.candidates = self.folder / "candidates.jsonl"
        self.samples = self.folder / "samples"
        self.checkpoints = self.folder / "checkpoints"
        self.adapter = self.folder / "adapter"
        self.requests = self.folder / "requests"
        self.data_file = self.folder / "data.json"
        self.aside = self.folder / ASIDE_FOLDER
        self.lock_file = self.folder / LOCK_FILE
        self.claim_file = self.folder / CLAIM_FILE

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run.

        Raises:
            UserError: when the folder holds no run.
        """
        run = cls(folder)
        if run.config_file.is_file():
            return run
        if run.folds():
            raise UserError(
                f"{folder} holds the folds of a cross-validation that has not come to its run yet: the command with --folds "
                "that began it goes on."
            )
        raise UserError(f"{folder} is not a run folder: it has no config.yaml. Give a folder made by 'rankfold train'.")

    # -------------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """The last status, {} when there is none yet."""
        try:
            status = json.loads(retry_while_locked(lambda: self.status_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def set_status(self, **values: Any) -> None:
        """Updates fields of status.json; the process, its machine and the time are added. With a state of rest the lock is released."""
        own = {"pid": os.getpid(), "born": process_start_time(os.getpid()), "host": HOST, "beat": time.time()}
        status = self.status() | values | own
        try:
            write_text(self.status_file, json.dumps(status, indent=1))
        finally:
            if values.get("state", "starting") not in LIVE_STATES:
                self.unlock()

    def is_live(self) -> bool:
        """True while another process is at work in this folder."""
        if locks.is_own(self.lock_file):
            return False
        if locks.is_held(self.lock_file):
            return True
        status = self.status()
        mine = status.get("pid") == os.getpid() and status.get("host", HOST) == HOST
        return status.get("state") in LIVE_STATES and not mine and self.has_process(status)

    def has_process(self, status: dict[str, Any]) -> bool:
        """Whether a process is at work here, which its lock says; the status, where there are no locks or on another machine."""
        held = locks.is_held(self.lock_file)
        unknown = held is None or status.get("host", HOST) != HOST
        return held or (unknown and is_process_alive(status))

    def state(self) -> str:
        """The state as it is now, 'lost' for a run whose process is gone; '' for a folder that says none."""
        status = self.status()
        state = status.get("state")
        if not isinstance(state, str):
            return ""
        return "lost" if state in LIVE_STATES and not self.has_process(status) else state

    def summary(self) -> str:
        """The state and how far the run is, as in 'stopped at step 5 of 50'."""
        status, state = self.status(), self.state()
        step, total = (status[key] if isinstance(status.get(key), int) else 0 for key in ("step", "total"))
        if state == "lost":  # what it said last is older than its newest checkpoint
            step = max(step, self.newest_step())
        at = f" at step {step} of {total}" if total else f" at step {step}" if step else ""
        if state == "stopped" and not step:
            return "taken out of the queue"
        said = {"queued": "waiting in the queue", "lost": f"killed{at}"} | dict.fromkeys(LIVE_STATES, f"at work{at}")
        return said.get(state, f"{state}{at}" if state else "in an unknown state")

    def request(self, request: str) -> None:
        """Leaves a request (stop, sample, save) for the process at work here.

        Raises:
            UserError: when none is.
        """
        if not self.is_live():
            raise UserError(f"{self.folder} is not running.")
        self.requests.mkdir(parents=True, exist_ok=True)
        (self.requests / request).touch()

    def check_not_live(self) -> None:
        """Raises UserError when another process is at work in this folder."""
        if self.is_live():
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raises UserError: another process is at work in this folder."""
        number = self.status().get("pid")
        raise UserError(
            f"{self.folder} is in use by a live run{f' (process {number})' if isinstance(number, int) else ''}. "
            f"Choose another --out, or stop it with: rankfold stop {self.folder}"
        )

    def lock(self) -> None:
        """Makes the folder, and makes it this process's own until `unlock`, a state of rest, or its end.

        Raises:
            UserError: when another process has it, or it cannot be written.
        """
        self.check_not_live()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not locks.acquire(self.lock_file):
                self.refuse()
        except OSError as error:
            raise UserError(
                f"--out {self.folder} cannot be written: {error.strerror or error}. Give a folder that can, with --out."
            ) from error

    def unlock(self) -> None:
        """Gives the folder back."""
        locks.release(self.lock_file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, the folder is this process's own. It stays so where it was so before."""
        before = locks.is_own(self.lock_file)
        self.lock()
        try:
            yield
        finally:
            if not before:
                self.unlock()

    def claim(self, **values: Any) -> None:
        """Makes the folder this process's own, and begins in it. values: fields of the status beside the state.

        Raises:
            UserError: when another live run has it, or it cannot be written.
        """
        self.lock()
        try:
            for folder in (self.samples, self.checkpoints, self.adapter, self.requests):
                folder.mkdir(parents=True, exist_ok=True)
            for request in REQUESTS:
                remove_file(self.requests / request)
            for leftover in self.folder.rglob(".*.tmp"):
                remove_file(leftover)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror or error} ({error.filename})."
            ) from error
        self.set_status(state="starting", error=None, **values)

    def take_requests(self) -> set[str]:
        """Requests that have come in since the last look; each is handed out once."""
        found = set(os.listdir(self.requests)).intersection(REQUESTS)
        for request in found:
            remove_file(self.requests / request)
        return found

    def append_log(self, text: str) -> None:
        """Appends text to log.txt, with the time."""
        with self.log_file.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    # -------------------------------------------------------------------------- what is there

    def folds(self) -> list[Run]:
        """The runs of a cross-validation that lies in this folder."""
        return [Run(path.parent) for path in sorted((self.folder / "folds").glob("*/config.yaml"))]

    def is_run(self) -> bool:
        """Whether the folder holds a run, whole or in parts, rather than files that somebody else has put there."""
        has_state = self.status().get("state") in STATES
        return bool(has_state or self.aside.is_dir() or self.checkpoint_files() or self.folds()) or is_config(
            self.config_file
        )

    def is_worth_keeping(self, keep: Collection[str] = ()) -> bool:
        """Whether there is anything that would be missed: not where a run has failed, or was killed, before its first checkpoint.

        keep: entries that stay as they are.
        """
        if self.checkpoint_files() or any((self.folder / "measured").glob("*/*")):
            return True
        if "folds" not in keep and any(fold.is_worth_keeping() for fold in self.folds()):
            return True
        state = self.state()
        return state in ("queued", "done", "stopped") or (not state and any(self.adapter.glob("*/*")))

    def finished_adapter(self) -> Path:
        """The adapter of a run that is done.

        Raises:
            UserError: when it is not, saying what there is.
        """
        if self.state() in ("done", ""):
            return self.adapter
        text = f"{self.folder} has no finished adapter, as its run is not done ({self.summary()})."
        if self.state() not in LIVE_STATES:
            text += f" Go on with it: rankfold resume {self.folder}"
        found = [self.adapter] if any(self.adapter.glob("*/*")) else []
        found += [path for path in sorted((self.folder / "measured").glob("[0-9]*"))[-1:]]
        if found:
            text += f" (What it had learned before is in {' and '.join(map(str, found))}.)"
        raise UserError(text)

    # -------------------------------------------------------------------------- room for another run

    def run_entries(self, keep: Collection[str] = ()) -> list[Path]:
        """What runs have left here, the config first: without it a folder is not a run."""
        there = [self.folder / name for name in RUN_ENTRIES if name not in keep]
        return [path for path in there if path.exists() or path.is_symlink()]

    def foreign_entries(self) -> list[str]:
        """Names of what no run has left here."""
        if not self.folder.is_dir():
            return []
        names = sorted(path.name for path in self.folder.iterdir())
        return [
            name
            for name in names
            if name not in (*RUN_ENTRIES, ASIDE_FOLDER, DELETED_FOLDER, LOCK_FILE, CLAIM_FILE)
            and not name.endswith(".tmp")
        ]

    def set_aside(self, keep: Collection[str] = ()) -> bool:
        """Clears away what an earlier run has left; True when that was worth keeping, and is only put aside as yet.

        It then comes back by `restore_aside`, and is deleted by `discard_aside`. Whatever kills this process in between, the
        folder never shows entries of both. keep: entries that stay.

        Raises:
            UserError: for what cannot be moved or deleted.
        """
        worth = self.is_worth_keeping(keep)
        try:
            delete_tree(self.folder / DELETED_FOLDER)
            if not worth:  # what a killed process had put aside before stays there
                for path in reversed(self.run_entries(keep)):
                    delete_tree(path)
                return self.aside.is_dir()
            self.discard_aside()
            self.aside.mkdir()
            move_all(self.run_entries(keep), self.aside)
        except OSError as error:
            raise UserError(
                f"The run in {self.folder} cannot be cleared away ({error.strerror or error}: {error.filename}): close what has it "
                "open, or give another --out."
            ) from error
        return True

    def restore_aside(self, keep: Collection[str] = ()) -> bool:
        """Brings back the run that was put aside instead of the one that is there; False when none was."""
        if not self.aside.is_dir() or not any(self.aside.iterdir()):  # empty: a kill came before anything was moved
            return False
        for path in self.run_entries(keep):
            delete_tree(path)
        self.move_back()
        return True

    def recover(self) -> None:
        """Brings back a run whose process was killed while it was put aside, or before the next one had its config."""
        if self.aside.is_dir() and not self.config_file.is_file() and not self.is_live():
            with self.locked():
                if self.aside.is_dir() and not self.config_file.is_file():
                    self.move_back()

    def move_back(self) -> None:
        """Moves what was put aside to where it was, the config last."""
        entries = sorted(self.aside.iterdir(), key=lambda path: path.name == self.config_file.name)
        for path in entries:
            delete_tree(self.folder / path.name)
            replace_file(path, self.folder / path.name)
        self.aside.rmdir()

    def discard_aside(self) -> None:
        """Deletes the run that was put aside, if one was; by another name, so that half of it never comes back."""
        delete_tree(self.folder / DELETED_FOLDER)
        if self.aside.is_dir():
            replace_file(self.aside, self.folder / DELETED_FOLDER)
            delete_tree(self.folder / DELETED_FOLDER)

    # -------------------------------------------------------------------------- metrics

    def append_metrics(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl."""
        with self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return [row for row in read_rows(self.metrics_file) if is_number(row.get("step", 0))]

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step`, so that no step stands twice after a resume."""
        if self.metrics_file.exists():
            kept = [row for row in self.metrics() if row.get("step", 0) <= step]
            write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    # -------------------------------------------------------------------------- checkpoints

    def checkpoint_files(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("[0-9]*.pt"))

    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        return max((int(path.stem) for path in self.checkpoint_files() if path.stem.isdecimal()), default=0)

    def prune_checkpoints(self, keep: int) -> None:
        """Deletes all but the newest `keep` checkpoints."""
        for path in self.checkpoint_files()[:-keep]:
            remove_file(path)


def is_config(file: Path) -> bool:
    """Whether a file is a run's config, to tell it from a config.yaml of anything else."""
    import yaml

    try:
        values = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(values, dict) and {"method", "out", "steps"} <= values.keys()


def move_all(paths: Collection[Path], folder: Path) -> None:
    """Moves entries into a folder on the same disk: all of them or, when one cannot be, none."""
    moved: list[Path] = []
    try:
        for path in paths:
            replace_file(path, folder / path.name)
            moved.append(path)
    except OSError:
        for path in moved:
            replace_file(folder / path.name, path)
        raise


def delete_tree(path: Path) -> None:
    """Deletes a file, a link, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        retry_while_locked(lambda: shutil.rmtree(path))
    else:
        remove_file(path)


def is_process_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status is there; on another machine: whether it was heard of lately."""
    pid = status.get("pid")
    if status.get("host", HOST) != HOST:
        beat = status.get("beat")
        heard = beat if isinstance(beat, int | float) else 0.0
        return time.time() - heard < HEARTBEAT_TIMEOUTS.get(str(status.get("state")), 300.0)
    began, said = process_start_time(pid) if pid is not None else None, status.get("born")
    return began is not None and isinstance(said, int | float) and abs(began - said) < CLOCK_TOLERANCE


def process_start_time(pid: int) -> float | None:
    """When the process began, to tell it from a later one with the same number; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, TypeError, ValueError, OverflowError):  # gone, or no number of a process
        return None
