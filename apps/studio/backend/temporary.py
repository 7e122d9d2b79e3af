"""The folder for what a studio has only for a while: uploads on their way, images on their way to a page. Nobody else can read it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....toolkit.core import locks

PREFIX, LOCK_FILE = "rankfold-studio-", "lock"
CLEAN_EVERY, KEEP_FOR = 3600, 24 * 3600  # seconds
YOUNG = 60  # seconds for which a folder may be one that has no lock yet


def make_temporary_folder() -> Path:
    """A new folder of this process's own, deleted at its end; those that killed studios have left are deleted now."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{PREFIX}*"):
        if is_own(left) and time.time() - left.stat().st_ctime > YOUNG and not is_used(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))  # for this user alone
    locks.acquire(folder / LOCK_FILE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


@contextmanager
def temporary_subfolder(name: str) -> Iterator[Path]:
    """A folder for a moment, where only this user can read."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        yield Path(folder)


def is_used(folder: Path) -> bool:
    """Whether a studio has it; where a file system has no locks, it is taken to."""
    file = folder / LOCK_FILE
    return file.exists() and locks.is_held(file) is not False


def is_own(folder: Path) -> bool:
    """Whether a folder is one, and this user's."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
    return mine and folder.is_dir() and not folder.is_symlink()
