"""The run folder: the one place where trainer, command line and app meet.

    runs/<id>/ config.yaml  status.json  metrics.jsonl  log.txt  samples/  checkpoints/  adapter/  requests/

States: queued -> starting -> running -> done, stopped or failed; lost is one whose process is gone without saying so.

Everything is written whole or not at all: a file is written beside its final name, flushed, and renamed.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import UserError
from .systems import patiently, put_in_place

LIVE = ("starting", "running")
REQUESTS = ("stop", "sample", "save")
SILENCE = {
    "starting": 1800.0,
    "running": 300.0,
}  # seconds without a sign of life after which a run on another machine is lost
HOST = socket.gethostname()


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all: beside its name, flushed to the disk, then renamed.

    Raises:
        UserError: when the disk is full or cannot be written; the file that was there before stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"Could not write {path}: {error.strerror or error}. Free some space or choose another --out; "
            "what was written before is whole."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, behind a whole one even if a killed process left half a line at the end."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(f"{line}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomic(path, text.encode())


def write_png(path: Path, picture: Image.Image, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically, with text chunks if given."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png", pnginfo=info)
    write_atomic(path, buffer.getbuffer())


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

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run.

        Raises:
            UserError: when the folder holds no run.
        """
        run = cls(folder)
        if not run.config_file.is_file():
            raise UserError(
                f"{folder} is not a run folder: it has no config.yaml. Give a folder made by 'rankfold train'."
            )
        return run

    # -------------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """The last status, {} when there is none yet."""
        try:
            status = json.loads(patiently(lambda: self.status_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def set_status(self, **values: Any) -> None:
        """Updates fields of status.json; the process, its machine and the time are added."""
        own = {"pid": os.getpid(), "born": born(os.getpid()), "host": HOST, "beat": time.time()}
        status = self.status() | values | own
        write_text(self.status_file, json.dumps(status, indent=1))

    def is_live(self) -> bool:
        """True while another process is at work in this folder."""
        status = self.status()
        mine = status.get("pid") == os.getpid() and status.get("host", HOST) == HOST
        return status.get("state") in LIVE and not mine and is_alive(status)

    def state(self) -> str:
        """The state as it is now, 'lost' for a run whose process is gone; '' for a folder that says none."""
        status = self.status()
        state = status.get("state", "")
        return "lost" if state in LIVE and not is_alive(status) else state

    def ask(self, request: str) -> None:
        """Leaves a request (stop, sample, save) for the process at work here.

        Raises:
            UserError: when none is.
        """
        if not self.is_live():
            raise UserError(f"{self.folder} is not running.")
        (self.requests / request).touch()

    def claim(self) -> None:
        """Makes the folder this process's own.

        Raises:
            UserError: when another live run has it.
        """
        if self.is_live():
            raise UserError(
                f"{self.folder} is in use by a live run (process {self.status()['pid']}). "
                f"Choose another --out, or stop it with: rankfold stop {self.folder}"
            )
        for folder in (self.samples, self.checkpoints, self.adapter, self.requests):
            folder.mkdir(parents=True, exist_ok=True)
        for request in REQUESTS:
            (self.requests / request).unlink(missing_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self.set_status(state="starting", error=None)

    def take_requests(self) -> set[str]:
        """Requests that have come in since the last look; each is handed out once."""
        found = set(os.listdir(self.requests)).intersection(REQUESTS)
        for request in found:
            (self.requests / request).unlink(missing_ok=True)
        return found

    def append_log(self, text: str) -> None:
        """Appends text to log.txt, with the time."""
        with self.log_file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    # -------------------------------------------------------------------------- metrics

    def append_metrics(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl."""
        with self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        if not self.metrics_file.exists():
            return []
        return [row for line in self.metrics_file.read_bytes().splitlines() if (row := row_of(line))]

    def cut_metrics(self, step: int) -> None:
        """Drops the lines behind `step`, so that no step stands twice after a resume."""
        if self.metrics_file.exists():
            kept = [row for row in self.metrics() if row.get("step", 0) <= step]
            write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    # -------------------------------------------------------------------------- checkpoints

    def checkpoint_files(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("[0-9]*.pt"))

    def prune_checkpoints(self, keep: int) -> None:
        """Deletes all but the newest `keep` checkpoints."""
        for path in self.checkpoint_files()[:-keep]:
            path.unlink(missing_ok=True)


def row_of(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that a killed process left half written, and for rubbish."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status is there; on another machine: whether it was heard of lately."""
    pid = status.get("pid")
    if status.get("host", HOST) != HOST:
        return time.time() - status.get("beat", 0.0) < SILENCE.get(status.get("state", ""), 300.0)
    return pid is not None and born(pid) is not None and born(pid) == status.get("born")


def born(pid: int) -> float | None:
    """When the process began, to tell it from a later one with the same number; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
