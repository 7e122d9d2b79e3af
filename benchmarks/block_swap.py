"""Blocks that wait in main memory (--blocks-to-swap): seconds, memory and copies of a step, beside diffusers' and accelerate's offload.

    python benchmarks/block_swap.py [--sizes sdxl flux] [--rounds 5] [--out benchmarks/results/block_swap.json]

Sizes and steps are those of training.py, batch 1, with activation checkpointing: none, half, nine tenths and all of the blocks swapped;
diffusers' group offloading by blocks, with a stream where there is a GPU; accelerate's cpu_offload. Each is said with its loss, which has
to be the same to the bit. On a CPU the sizes are small, nothing is saved, and what is shown are the copies and the losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from timing import seconds
from torch import nn

from rankfold.toolkit.adapters.attach import attach, trainable_parameters
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.devices import release_memory
from rankfold.training.engine.block_swap import find_block_swap, swap_blocks, swapped_numbers
from rankfold.training.subject.denoising import repeated_blocks
from training import DEVICE, GPU, RANK, SIZES, fresh, loss_of

WAYS = ("0", "half", "nine tenths", "all", "diffusers", "accelerate")


def place(denoiser: nn.Module, way: str) -> None:
    """Brings an adapted denoiser from main memory to the device in one of the ways."""
    device, host, blocks = torch.device(DEVICE), torch.device("cpu"), repeated_blocks(denoiser)
    if way == "diffusers":
        apply_group_offloading(denoiser, device, host, "block_level", num_blocks_per_group=1, use_stream=GPU)
    elif way == "accelerate":
        accelerate.cpu_offload(denoiser, device)
    elif count := {"0": 0, "half": len(blocks) // 2, "nine tenths": len(blocks) * 9 // 10, "all": len(blocks)}[way]:
        swap_blocks(denoiser, [blocks[number] for number in swapped_numbers(count, len(blocks))], device)
    else:
        denoiser.to(device)


def measure(size: str, way: str, rounds: int) -> dict[str, Any]:
    """A step's loss, median seconds, copies of blocks, and GiB at the peak, all weights included."""
    denoiser, inputs = fresh(size)
    denoiser.to("cpu")
    attach(denoiser, make_config("moslora", rank=RANK, alpha=RANK, dropout=0.0, target_modules=SIZES[size][1]))
    denoiser.enable_gradient_checkpointing()
    place(denoiser, way)
    torch.manual_seed(1)
    given, found = inputs(1), []

    def step() -> None:
        loss = loss_of(denoiser, given)
        loss.backward()
        found.append(loss.item())
        for parameter in trainable_parameters(denoiser):
            parameter.grad = None

    return {"loss": found} | cost(step, denoiser, rounds)


def cost(step: Callable[[], None], denoiser: nn.Module, rounds: int) -> dict[str, Any]:
    """What a step costs, once it has been taken twice."""
    step()
    step()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    before = swap.copies if (swap := find_block_swap(denoiser)) else 0
    times = [seconds(step) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else None
    return {
        "seconds": statistics.median(times),
        "peak GiB": peak,
        "copies": (swap.copies - before) / rounds if swap else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": torch.cuda.get_device_name(0) if GPU else "CPU", "torch": torch.__version__}
    for size in options.sizes:
        for way in WAYS:
            try:
                found[f"{size}, {way}"] = measure(size, way, options.rounds)
            except Exception as error:  # of a library that cannot train so
                found[f"{size}, {way}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(size, way, json.dumps(found[f"{size}, {way}"]), flush=True)
            release_memory()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
