"""What Windows, macOS and Linux do differently with processes, memory and files, in one place."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")

WINDOWS = sys.platform == "win32"
LOCK_TIMEOUT = 2.0 if WINDOWS else 0.0  # seconds that a file may be refused because another process has it open
MANY_FILES = 4096  # that are open at once; systems begin with 256 to 1024
NEW_GROUP, NO_WINDOW = 0x0000_0200, 0x0800_0000  # of CreateProcess; subprocess names them on Windows only


def peak_rss() -> int:
    """Most main memory that this process has had so far, bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def max_open_files() -> int:
    """How many files this process may have open at once, after its own limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MANY_FILES and soft != hard:
        soft = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


def detached_process_kwargs(*, windows: bool = WINDOWS) -> dict[str, Any]:
    """Arguments of subprocess.Popen for a process that outlives this one and its terminal.

    On Windows it gets a console that nobody sees: with none at all, each process that it starts itself would open a window.
    """
    return {"creationflags": NEW_GROUP | NO_WINDOW} if windows else {"start_new_session": True}


def retry_while_locked(action: Callable[[], Made]) -> Made:
    """What the action gives. Windows refuses a file while another process has it open, so there it is tried for a while."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def replace_file(source: Path, target: Path) -> None:
    """Renames a file over another, which may be open elsewhere."""
    retry_while_locked(lambda: os.replace(source, target))


def remove_file(path: Path) -> None:
    """Deletes a file, which may be open elsewhere or gone already."""
    retry_while_locked(lambda: path.unlink(missing_ok=True))
