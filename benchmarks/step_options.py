"""Where the time of a training step goes, and what the usual tricks gain on this machine.

    python benchmarks/step_options.py [--rounds 20] [--base FOLDER] [--out benchmarks/results/step_options.json]

One step of subject training on the embedded model. First its parts (drawing the batch, forward, backward, clipping,
optimizer) and the heaviest operators; then each trick against the plain step, alternating in one process: the median of the
rounds' ratios plain / trick (above 1 is a gain), with their spread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BATCH = 4


def make_task(folder: Path, base: str, adapter: str, **settings):
    """A subject-training task with its optimizer, as the loop would have it."""
    import torch
    from accelerate import Accelerator

    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.engine.optimizer import make_optimizer
    from rankfold.training.launch.start import preflight
    from rankfold.training.subject.task import SubjectTask

    images = ROOT / "assets" / "demo" / "creature"
    settings = {"preservation_weight": 0.0} | settings
    config = SubjectConfig(base=base, images=images, out=folder, batch_size=BATCH, adapter=adapter, **settings)
    config, inputs = preflight(config)
    task = SubjectTask(config, *inputs, Accelerator(cpu=not torch.cuda.is_available()))
    return task, make_optimizer(config, task.parameter_groups())


class Step:
    """One optimizer step, in parts."""

    def __init__(self, task, optimizer, module=None) -> None:
        self.task, self.optimizer, self.module = task, optimizer, module or task.module
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.number = 0

    def __call__(self) -> dict[str, float]:
        import torch

        marks = [("", time.perf_counter())]
        batch = self.task.batch(self.number * BATCH, list(range(BATCH)))
        marks.append(("batch", time.perf_counter()))
        loss = self.module(batch).mean()
        marks.append(("forward", time.perf_counter()))
        loss.backward()
        marks.append(("backward", time.perf_counter()))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        marks.append(("clip", time.perf_counter()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(("optimizer", time.perf_counter()))
        self.number += 1
        return {name: end - begin for (_, begin), (name, end) in itertools.pairwise(marks)}


class TwoForwards(Step):
    """Class images in a forward pass of their own, behind the subject's."""

    def __call__(self) -> dict[str, float]:
        import torch

        begin = time.perf_counter()
        batch = self.task.batch(self.number * BATCH, list(range(BATCH)))
        for half in (slice(0, BATCH), slice(BATCH, None)):
            (self.module({key: value[half] for key, value in batch.items()}).mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return {"step": time.perf_counter() - begin}


def ratios(plain: Callable, other: Callable, rounds: int) -> list[float]:
    """plain / other, seconds of a step, alternating."""
    for step in (plain, other) * 3:
        step()
    found = []
    for number in range(rounds):
        pair = [("plain", plain), ("other", other)]
        times = {name: sum(step().values()) for name, step in (pair if number % 2 == 0 else pair[::-1])}
        found.append(times["plain"] / times["other"])
    return found


def tricks(folder: Path, base: str) -> dict[str, tuple[Callable, Callable]]:
    """Each trick's plain step, and the step with it."""
    import torch

    def steps(adapter: str = "lora", **settings) -> Step:
        return Step(*make_task(folder, base, adapter, **settings))

    def channels_last() -> Step:
        step = steps()
        step.task.training.model.unet.to(memory_format=torch.channels_last)
        return step

    def with_optimizer(**settings) -> Step:
        step = steps()
        step.optimizer = torch.optim.AdamW(step.parameters, lr=1e-3, **settings)
        return step

    def compile_step() -> Step:
        step = steps()
        step.module = torch.compile(step.module)
        return step

    def separate_forwards() -> Step:
        return TwoForwards(*make_task(folder, base, "lora", prior_weight=1.0, prior_images=8))

    return {
        "channels-last": (steps(), channels_last()),
        "fused AdamW over foreach": (with_optimizer(foreach=True), with_optimizer(fused=True)),
        "fused AdamW over a loop": (with_optimizer(foreach=False), with_optimizer(fused=True)),
        "torch.compile": (steps(), compile_step()),
        "subject and class images in one forward": (separate_forwards(), steps(prior_weight=1.0, prior_images=8)),
        "PEFT LoRA over MoSLoRA": (steps("moslora"), steps("lora")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("RANKFOLD_CACHE", f"{folder}/cache")
        step = Step(*make_task(Path(folder) / "run", options.base, "lora"))
        rows = [step() for _ in range(options.rounds + 3)][3:]
        parts = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        whole = sum(parts.values())
        for name, seconds in parts.items():
            print(f"{name:>10}  {seconds * 1e3:7.2f} ms  {seconds / whole:6.1%}")
        with torch.profiler.profile() as profile:
            for _ in range(3):
                step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
        found = {}
        for name, (plain, other) in tricks(Path(folder) / "run", options.base).items():
            gains = found[name] = ratios(plain, other, options.rounds)
            print(f"{name:44} {statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"parts": parts, "gains": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
