"""Commands in processes whose surroundings are at fault: no space, no permission, no home, hardly any open files."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked


def without_privileges() -> None:
    """From here on root, too, may do only what permissions allow."""
    import ctypes

    version, none = 0x20080522, (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset((ctypes.c_uint32 * 2)(version, 0), none):
        raise OSError(ctypes.get_errno(), "capset")


def without_home() -> None:
    """From here on as a user whom the system does not know, without a home."""
    for name in ("HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)
    os.setgid(54321)
    os.setuid(54321)


def few_files(count: int = 24) -> None:
    """At most so many open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def in_deleted_folder(folder: str) -> None:
    """In a working directory that is gone."""
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    os.rmdir(folder)


def output_to(path: str) -> None:
    """Standard output goes to a file, such as /dev/full; '' closes it."""
    if not path:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
        return
    os.dup2(os.open(path, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def output_to_nobody() -> None:
    """Standard output goes to a reader who has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def without_encoding() -> None:
    """A terminal that knows ASCII alone."""
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="ascii", closefd=False)  # noqa: SIM115


def run_under(before: Callable[[], None] | None, words: list[str]) -> None:
    from rankfold.apps.cli import main

    if before:
        before()
    main(words)


def start(words: list[Any], log: Path, before: Callable[[], None] | None = None, **environment: str) -> Any:
    """A command as a process. before: what is done in it first."""
    return forked.start_process(partial(run_under, before, [str(word) for word in words]), log, **environment)


def end_of(
    words: list[Any], log: Path, before: Callable[[], None] | None = None, **environment: str
) -> tuple[int, str]:
    """Exit code of a command, and what it said."""
    process = start(words, log, before, **environment)
    process.join(300)
    code = process.exitcode
    process.kill()
    return code, log.read_text(encoding="utf-8", errors="replace")


def mount_tmpfs(folder: Path, size: str) -> bool:
    """A small disk in memory; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def small_shared_memory() -> None:
    """A /dev/shm of 64 KiB, for this process alone, and little patience with it."""
    import ctypes

    from rankfold.training.instruct import conversations

    libc = ctypes.CDLL(None, use_errno=True)
    private, new_mounts = 1 << 18 | 1 << 14, 0x00020000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        return
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        return
    conversations.READ_SECONDS = 8.0
