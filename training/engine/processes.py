"""The processes of a run: what they run on, and how they are told to stop."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object

from ...toolkit.core import devices
from ...toolkit.core.devices import distributed_state
from ...toolkit.core.errors import UserError, one_line_message
from ..config.base import LoopConfig

Given = TypeVar("Given")
Made = TypeVar("Made")
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


def make_accelerator(config: LoopConfig, threads: int = 0) -> Accelerator:
    """The accelerator of a run. threads: as many as the run has had so far, where that is known; else as many as find a free core.

    Raises:
        UserError: when accelerate is set to shard the adapter.
    """
    if devices.THREADS > 1 or config.threads:
        torch.set_num_threads(config.threads or threads or devices.num_free_threads(devices.num_busy_cores()))
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.unused_parameters)],
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Accelerate is set to {kind.value}, which would shard the adapter too: launch with --multi_gpu (or choose it in `accelerate "
            "config`), and shard the frozen base alone with --shard-base; --quantize nf4 makes it small instead."
        )
    return accelerator


def check_tracker(name: str) -> None:
    """Raises UserError when a tracker's library is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name} is not installed: pip install {name}.")


def check_devices(config: LoopConfig) -> None:
    """Raises UserError when the dtype or the batch does not suit the devices."""
    devices.check_precision(config.precision)
    if num_processes() > 1 and (
        fault := devices.distributed_fault(devices.this_machine(), nccl=dist.is_nccl_available())
    ):
        raise UserError(fault)
    if config.batch_size % num_processes():
        raise UserError(
            f"--batch-size {config.batch_size} cannot be divided evenly among {num_processes()} processes; "
            "it counts the images of all processes together."
        )


def is_main_process() -> bool:
    """Whether this is the process that has the run folder, by what launchers say; before there is an accelerator to ask."""
    return int(os.environ.get("RANK", 0)) == 0


def num_processes() -> int:
    """How many processes the run has, by what launchers say."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share_work(accelerator: Accelerator, makers: Sequence[Callable[[], Made]]) -> list[Made]:
    """What all makers give. Each process calls its share of them first, and the others' after that, out of a cache by then."""
    own = range(accelerator.process_index, len(makers), accelerator.num_processes)
    made = {number: makers[number]() for number in own}
    accelerator.wait_for_everyone()
    return [made[number] if number in made else make() for number, make in enumerate(makers)]


def map_distributed(given: Sequence[Given], work: Callable[[Given], Made]) -> list[Made]:
    """work(one) of all that is given, in order: each process does its share, and gets what all have made.

    All work equally often, who has no more to do on something once more: blocks that are sharded are gathered in every process at once.
    """
    state = distributed_state()
    count = state.num_processes
    end = -(-len(given) // count) * count
    own, fault = [], None
    for at in range(state.process_index, end, count):
        try:
            own.append(work(given[at % len(given)]))
        except Exception as error:  # the others wait for this process, and must hear of it
            fault = error
            break
    everybodys = gather_object([(own, fault and one_line_message(fault))])
    if fault:
        raise fault
    if faults := [text for _, text in everybodys if text]:
        raise RuntimeError(f"another process: {faults[0]}")
    return [made for turn in zip(*(own for own, _ in everybodys), strict=True) for made in turn][: len(given)]


def broadcast_first(answer: Made) -> Made:
    """The first process's answer, to all."""
    return broadcast_object_list([answer])[0]


class StopSignal:
    """Set by SIGTERM, Ctrl-C or, on Windows, Ctrl-Break; a second one ends the process at once. A terminal that is lost ends nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._ask)
            if hasattr(signal, "SIGHUP"):
                self._old[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, self._old[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
