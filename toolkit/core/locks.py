"""Locks on files that the kernel gives to one process and takes back when it ends, however it ends.

So a lock is never stale, whatever has been killed and wherever the clock was set, and nothing need be removed: a lock file is empty and
stays. Where a file system has no locks (some network ones), everybody gets them, and what is written in the folder must do.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from threading import RLock
from typing import Any

from .systems import WINDOWS

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None
try:
    import msvcrt
except ImportError:  # any other
    msvcrt: Any = None

HELD_ERRORS = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
PROBE_SECONDS = 0.25  # for which a lock may be refused because somebody is just looking whether it is held
WINDOWS_PLACE = (
    1 << 30
)  # of the byte that is locked, beyond whatever the file holds: on Windows nobody else may read it

_held: dict[Path, int] = {}  # this process's own: lock file -> its open descriptor
_guard = RLock()


def acquire(path: Path, wait: float = 0.0) -> bool:
    """Takes the lock, which this process may have already; False when another process keeps it for longer than `wait` seconds.

    Raises:
        OSError: when the file cannot be made.
    """
    end = time.monotonic() + max(wait, PROBE_SECONDS)
    with _guard:
        while not is_own(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            taken = _lock(descriptor, shared=False)
            if taken is not False and _is_file(descriptor, path):
                _held[_key(path)] = descriptor
                break
            os.close(descriptor)
            if taken is False:  # else the file was deleted in between
                if time.monotonic() >= end:
                    return False
                time.sleep(0.01)
        return True


def release(path: Path) -> None:
    """Gives back a lock of this process; nothing where it has none."""
    with _guard:
        if (descriptor := _held.pop(_key(path), None)) is not None:
            os.close(descriptor)


def is_own(path: Path) -> bool:
    """Whether this process has the lock."""
    with _guard:
        descriptor = _held.get(_key(path))
        if descriptor is not None and not _is_file(descriptor, path):  # its folder was deleted
            release(path)
        return _key(path) in _held


def is_held(path: Path) -> bool | None:
    """Whether some process has the lock; None where that cannot be told: no such file, not to be opened, no locks there."""
    if is_own(path):
        return True
    try:
        descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    except OSError:
        return None
    try:
        free = _lock(descriptor, shared=True)
        return None if free is None else not free
    finally:
        os.close(descriptor)


def _key(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one by that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _lock(descriptor: int, *, shared: bool) -> bool | None:
    """Locks an open file if it is free; None where there are no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(descriptor, WINDOWS_PLACE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            return None
    except OSError as error:
        return False if error.errno in HELD_ERRORS else None
    return True


def _forget() -> None:
    """In a child that was forked: the locks are its parent's alone, and end with it."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
