"""What a command takes: wall time, processor time, the most memory; and what an installed package takes on the disk."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import psutil

from rankfold.toolkit.core.errors import UserError

EVERY = 0.1
"""Seconds between two looks at the memory."""


def run_commands(commands: list[list[str]], log: Path) -> dict[str, float]:
    """Seconds, processor seconds and the most GiB of all commands together.

    Raises:
        UserError: when one fails.
    """
    began, before, most = time.perf_counter(), os.times(), 0
    for command in commands:
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent)
        watch = MemoryWatch(process.pid)
        if process.wait():
            raise UserError(f"{command[:4]} failed: {log.read_text(encoding='utf-8', errors='replace')[-1500:]}")
        most = max(most, watch.end())
    after = os.times()
    return {
        "seconds": time.perf_counter() - began,
        "processor seconds": after.children_user
        + after.children_system
        - before.children_user
        - before.children_system,
        "peak GiB": most / 2**30,
    }


class MemoryWatch(threading.Thread):
    """Looks at the resident memory of a process and its children until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(EVERY):
            try:
                parent = psutil.Process(self.pid)
                family = [parent, *parent.children(recursive=True)]
                self.most = max(self.most, sum(one.memory_info().rss for one in family))
            except psutil.Error:
                continue

    def end(self) -> int:
        """Bytes at the peak."""
        self.over.set()
        self.join()
        return self.most


def installed_bytes(*names: str) -> dict[str, Any]:
    """Packages and MiB that these need, themselves included, extras left out."""
    wanted, found = list(names), {}
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system or Python
            continue
        files = [package.locate_file(file) for file in package.files or []]
        found[name] = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
        for need in package.requires or []:
            if "extra ==" not in need:
                wanted.append(re.split(r"[\s;<>=!~\[(]", need, maxsplit=1)[0])
    return {"packages": len(found), "MiB": sum(found.values()) / 2**20}


if __name__ == "__main__":
    raise SystemExit("These are parts of compare.py.")
