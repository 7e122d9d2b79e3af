"""Where a pipeline's parts are: all on the accelerator, or each while it is at work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..toolkit.core.devices import device, free_memory

WEIGHT_SHARE = 0.8
"""Share of the free memory that weights may take; the rest is for what the images need."""


def place_pipeline(pipe: Any) -> Any:
    """Puts a pipeline on this process's device; returns it."""
    where = device()
    free = free_memory(where)
    return pipe.to(where) if free is None else place_on_device(pipe, where, free)


def place_on_device(pipe: Any, device: torch.device, free: int) -> Any:
    """Puts a pipeline on a device with so many free bytes.

    Where its weights would take too much of them, each part stays in main memory and comes while it is at work (diffusers'
    enable_model_cpu_offload), so that the largest alone has to fit.
    """
    if weight_bytes(pipe) <= WEIGHT_SHARE * free:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def weight_bytes(pipe: Any) -> int:
    """Bytes of a pipeline's weights."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))


def execution_device(pipe: Any) -> torch.device:
    """The device that a pipeline computes on, wherever its parts lie now."""
    return pipe._execution_device
