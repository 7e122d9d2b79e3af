"""What benchmarks share: the time and the memory of a step, the spread of ratios, and what is remembered between two runs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rankfold.toolkit.core.files import write_text


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one step, with what it has left to the GPU."""
    finish()
    start = time.perf_counter()
    step()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """Waits until the GPU has done what was asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Highest sum of live allocations during a step."""
    if device == "cuda":
        finish()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def load_or_make(file: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or what is made and then written there."""
    if not file.is_file():
        write_text(file, json.dumps(make(), indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit("These are parts of other benchmarks.")
