"""The device that everything runs on, chosen here as accelerate chooses it, and what will not work on it.

A kind of device is what torch calls it: cuda (AMD's ROCm too), xpu (Intel), mps (Apple) or cpu.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .errors import UserError
from .systems import peak_rss

GIB = 2**30
THREADS = torch.get_num_threads()  # torch's own choice, before anybody has made another


def distributed_state() -> PartialState:
    """The processes that a launcher has started, of which this is one, with a device of its own; or this one alone."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def device_type() -> str:
    """The kind of device that accelerate chooses, without starting anything on it; ACCELERATE_USE_CPU=true asks for the CPU."""
    if PartialState._shared_state:
        return distributed_state().device.type
    choose: Any = PartialState.default_device
    return "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else choose.fget(None).type


def device() -> torch.device:
    """The device of this process."""
    found: Any = distributed_state().device
    if found.index is None and found.type in ("cuda", "xpu"):
        return torch.device(found.type, torch_backend(found.type).current_device())
    return found


def parse_device(text: str) -> torch.device:
    """The device that a user names, or the one above.

    Raises:
        UserError: for one that is not here.
    """
    if not text:
        return device()
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {text} is not available here: leave it out for {device()}, or take cpu.") from error


def torch_backend(kind: str) -> Any:
    """torch's module of a kind of accelerator: torch.cuda, torch.xpu, torch.mps."""
    return getattr(torch, kind)


def num_free_threads(others: float, max_threads: int = THREADS) -> int:
    """How many of torch's threads find a core of their own beside other processes that keep `others` cores busy.

    One more than that is worse than one less: all threads wait for each other after every operation, and one that has to share its core
    made a small model twenty times slower (benchmarks/busy_machine.py).
    """
    return min(max_threads, max(1, (os.cpu_count() or 1) - round(others)))


def num_busy_cores(seconds: float = 0.3) -> float:
    """How many cores other processes keep busy just now, by a look that takes so many seconds."""
    own = psutil.Process().cpu_times
    before = own()
    share = psutil.cpu_percent(interval=seconds) / 100
    after = own()
    mine = (after.user + after.system - before.user - before.system) / seconds
    return max(0.0, share * (os.cpu_count() or 1) - mine)


# ---------------------------------------------------------------------------------------------- memory and seeds


def has_own_memory(kind: str) -> bool:
    """Whether devices of this kind have a memory of their own, beside the main memory."""
    return kind in ("cuda", "xpu")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device with memory of its own; None where it shares the main memory."""
    return torch_backend(device.type).mem_get_info(device)[0] if has_own_memory(device.type) else None


def peak_memory() -> int:
    """Most bytes that this process has had so far on its device, on a CPU resident in main memory."""
    kind = device_type()
    if kind in ("cuda", "xpu"):
        return torch_backend(kind).max_memory_allocated()
    return torch.mps.driver_allocated_memory() if kind == "mps" else peak_rss()


def release_memory() -> None:
    """Gives memory back that nothing uses any more."""
    gc.collect()
    if (kind := device_type()) != "cpu":
        torch_backend(kind).empty_cache()


def seed_generators(device: torch.device, number: int) -> None:
    """Seeds what is drawn on the CPU and on a device."""
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch_backend(device.type).manual_seed(number)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on the CPU where its own device may have none (no mps has, not every xpu)."""
    return tensor.double() if tensor.device.type in ("cpu", "cuda") else tensor.cpu().double()


def supports_pinned_memory(device: torch.device) -> bool:
    """Whether a device reads pinned main memory while it works."""
    return device.type in ("cuda", "xpu")


# ---------------------------------------------------------------------------------------------- what will not work


def has_kernel(operation: str, kind: str) -> bool:
    """Whether an operation, such as aten::_fused_adamw_, is there for a kind of device."""
    library = operation.split("::")[0]
    if library != "aten":
        try:
            importlib.import_module(library)
        except Exception:  # whatever a library that does not suit this machine says
            return False
    keys = (kind.upper(), "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    try:
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(operation, key) for key in keys)
    except RuntimeError:  # no such operation
        return False


@dataclass(frozen=True)
class Machine:
    """All that decides what will work."""

    kind: str
    system: str = "Linux"
    macos: tuple[int, ...] = ()
    """Version of macOS, () elsewhere."""
    has_kernel: Callable[[str, str], bool] = has_kernel


def this_machine() -> Machine:
    """This machine."""
    version = tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdecimal())
    return Machine(device_type(), platform.system(), version)


QUANTIZE_KERNELS = {
    "nf4": ("bitsandbytes::quantize_4bit", "bitsandbytes::dequantize_4bit"),
    "int8": ("bitsandbytes::int8_vectorwise_quant", "bitsandbytes::int8_linear_matmul"),
}
EIGHT_BIT = ("AdamW8bit", "Lion8bit")
FUSED = {name: f"aten::_fused_{name.lower()}_" for name in ("AdamW", "Adam", "SGD", "Adagrad")}


def precision_fault(machine: Machine, precision: str, *, training: bool = True) -> str:
    """Why a dtype will not work, with the cure; '' where it will."""
    if precision == "fp16" and training and machine.kind == "cpu":
        return "needs a GPU; use bf16 or fp32."
    if precision == "bf16" and machine.kind == "mps" and machine.macos < (14,):
        return "needs macOS 14 or newer; use fp32, or fp16."
    return ""


def quantize_fault(machine: Machine, quantize: str) -> str:
    """The same of --quantize, for libraries that are installed."""
    if quantize == "fp8" and machine.kind == "mps":
        return "needs 8 bit floating point, which mps lacks; use nf4 or int8."
    if not all(machine.has_kernel(operation, machine.kind) for operation in QUANTIZE_KERNELS.get(quantize, ())):
        return f"needs operations that the installed bitsandbytes lacks on {machine.kind}; use another, or none."
    return ""


def optimizer_fault(machine: Machine, optimizer: str) -> str:
    """The same of --optimizer."""
    if optimizer in EIGHT_BIT and not machine.has_kernel("bitsandbytes::optimizer_update_8bit_blockwise", machine.kind):
        return f"needs operations that the installed bitsandbytes lacks on {machine.kind}; use AdamW."
    return ""


def attention_fault(machine: Machine, attention: str) -> str:
    """The same of --attention."""
    return "needs a GPU of kind cuda: leave it at sdpa." if "flash" in attention and machine.kind != "cuda" else ""


def distributed_fault(machine: Machine, *, nccl: bool) -> str:
    """Why several processes cannot share the work, with the cure; '' where they can. nccl: whether torch was built with it."""
    if machine.kind == "mps":
        return "A Mac has one device: start the run without a launcher."
    if machine.kind == "cuda" and not nccl:
        return f"Several GPUs need NCCL, which torch lacks on {machine.system}: start the run on one, or on Linux (WSL 2 will do)."
    return ""


def has_fused_kernel(machine: Machine, optimizer: str) -> bool:
    """Whether torch's optimizer has a step in one kernel."""
    return optimizer in FUSED and machine.has_kernel(FUSED[optimizer], machine.kind)


def list_faults(machine: Machine, installed: Callable[[str], bool]) -> list[str]:
    """All that will not work, a sentence each. installed: whether a library is there; of those that are not, nothing is said."""
    found = {f"training with --precision {name}": precision_fault(machine, name) for name in ("fp16", "bf16")}
    if installed("bitsandbytes"):
        found |= {f"--quantize {name}": quantize_fault(machine, name) for name in QUANTIZE_KERNELS}
        found |= {f"--optimizer {name}": optimizer_fault(machine, name) for name in EIGHT_BIT}
    if installed("torchao"):
        found["--quantize fp8"] = quantize_fault(machine, "fp8")
    found["--attention flash_attention_2"] = attention_fault(machine, "flash_attention_2")
    return [f"{flag} {fault}" for flag, fault in found.items() if fault]


def raise_fault(flag: str, fault: str) -> None:
    """Raises UserError when there is a fault."""
    if fault:
        raise UserError(f"{flag} {fault}")


def check_precision(precision: str, *, training: bool = True) -> None:
    """Raises UserError for a dtype that does not work on this device."""
    raise_fault(f"--precision {precision}", precision_fault(this_machine(), precision, training=training))


# ---------------------------------------------------------------------------------------------- for people


def describe_devices() -> list[str]:
    """The device, or each of several, in a line."""
    kind = device_type()
    if kind in ("cuda", "xpu"):
        module, rocm = torch_backend(kind), " (ROCm)" if torch.version.hip else ""
        return [
            f"{kind}{rocm} {number}: {module.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            for number in range(module.device_count())
            for free, total in [module.mem_get_info(number)]
        ]
    if kind == "mps":
        return [
            f"mps: Apple's GPU, which may take {torch.mps.recommended_max_memory() / GIB:.1f} GiB of the main memory"
        ]
    return [f"{kind}: torch finds no GPU; the embedded models train on the CPU"]
