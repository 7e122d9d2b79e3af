"""What a training that ran out of memory is told: the next saving, and that what it has learned is kept."""

from __future__ import annotations

from ...toolkit.core.out_of_memory import OutOfMemory, is_out_of_memory, to_out_of_memory
from ...toolkit.core.run_folder import Run
from ..config.base import LoopConfig
from ..config.images import DiffusionConfig
from ..config.instruct import ConversationConfig
from ..config.subject import SubjectConfig
from .savings import savings


def run_out_of_memory(fault: Exception, config: LoopConfig, run: Run, *, building: bool) -> OutOfMemory | None:
    """What a fault becomes that says that memory ran out; None for any other. building: the task was not there yet."""
    if not is_out_of_memory(fault):
        return None
    reading = "DataLoader worker" in str(fault)
    doing = "preparing the run" if building else "reading images ahead" if reading else "training"
    return to_out_of_memory(fault, doing, lambda: advice(config, run, reading=reading))


def advice(config: LoopConfig, run: Run, *, reading: bool = False) -> str:
    """A sentence or two: what would take less, and where the run goes on. reading: workers that read images lacked it."""
    if reading:
        cure = "Put 'workers: 0' into config.yaml, or begin with --workers 0."
    elif saving := next_saving(config):
        cure = f"Start again with {saving}{', the next saving of --fit' if isinstance(config, SubjectConfig) else ''}."
    else:
        cure = last_resort(config)
    files = run.checkpoint_files()
    if not files:
        return f"{cure} No checkpoint had been written yet."
    return f"{cure} The last checkpoint, {files[-1].name}, is whole: 'rankfold resume {run.folder}' goes on from it, given more memory."


def next_saving(config: LoopConfig) -> str:
    """The first rung of --fit that the config does not have and that works here; '' when it has them all."""
    return next((flags for flags, _ in savings(config)), "")


def last_resort(config: LoopConfig) -> str:
    """What is left when all of --fit is there."""
    if isinstance(config, DiffusionConfig):
        return "Lower --resolution, or choose a smaller base."
    return "Lower --max-length, or choose a smaller base." if isinstance(config, ConversationConfig) else ""
