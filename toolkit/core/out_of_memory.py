"""A lack of memory, on a GPU or a CPU, as one sentence: what was being done, and what would take less."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import UserError

# As torch, CUDA, MPS, Level Zero, C++ and the system say it; a size that no number holds is more than there is, too.
SIGNS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|insufficient shared memory|bad_alloc|"
    r"bad allocation|ALLOC_FAILED|OUT_OF_(HOST|DEVICE)_MEMORY|calculation overflowed|multiplication overflow|"
    r"DataLoader worker .*killed by signal: (Killed|Bus error)",
    re.IGNORECASE,
)
DEVICES = re.compile(r"\b(CUDA|HIP|MPS|XPU)\b")


class OutOfMemory(UserError):
    """Memory ran out. cure: a sentence, which whoever knows it may add."""

    def __init__(self, doing: str, where: str = "", cure: str = "") -> None:
        super().__init__(doing)
        self.doing, self.where, self.cure = doing, where, cure

    def __str__(self) -> str:
        return f"Memory {self.where}ran out while {self.doing}. {self.cure}".strip()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemory)) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and SIGNS.search(str(error)):
            return True
        error = error.__cause__
    return False


def to_out_of_memory(error: BaseException, doing: str, cure: Callable[[], str] | str = "") -> OutOfMemory:
    """What such an exception becomes. What a run of inner frames held is let go, so that there is memory to say it."""
    traceback.clear_frames(error.__traceback__)
    said = error if isinstance(error, OutOfMemory) else OutOfMemory(doing, device_phrase(error))
    said.cure = said.cure or (cure if isinstance(cure, str) else cure())
    return said


def general_advice() -> str:
    """What helps where nobody knows better."""
    from .devices import device_type  # heavy, and loaded by the time that memory runs out

    if device_type() == "cpu":
        return "Close other programs, or take smaller images or a smaller base."
    return "Free what else is on it, or put ACCELERATE_USE_CPU=true before the command, which then runs in main memory."


def device_phrase(error: BaseException) -> str:
    """'of the GPU ' where the exception names one."""
    return "of the GPU " if DEVICES.search(str(error)) else ""


@contextmanager
def oom_context(doing: str, cure: Callable[[], str] | str = "") -> Iterator[None]:
    """Whatever lacks memory within becomes an OutOfMemory that says what was being done, the innermost first. Also a decorator.

    doing: behind "while", such as "drawing 4 images"; '' only adds a cure. cure: a sentence, or what gives it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = to_out_of_memory(error, doing, cure)
        if said is not error:
            raise said from error
        if doing:
            said.doing += f" ({doing})"
        raise
