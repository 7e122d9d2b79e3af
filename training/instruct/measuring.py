"""A vision-language task measured while it is learned: the loss of held-out answers, answers that are scored, and which step is kept.

The words and files are those of subjects: measured.jsonl has a line for each measurement, measured/ the adapter at each, choice.json
which step was kept. A step's score is the share of right answers, or without answers the negative loss of each row. Steps that cannot be
told apart from the best (paired bootstrap over images, 95 %) count as equal, and of these the earliest is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ...toolkit.adapters.attach import disable_adapters, load_adapter_state
from ...toolkit.core.run_folder import Run
from ...toolkit.data.conversations import Conversation
from ...toolkit.formats.adapter_folder import WEIGHTS
from ..config.instruct import InstructConfig
from ..engine.processes import broadcast_first
from ..evaluation import measuring
from ..evaluation.instruct import answer_limit, ask_items, control_metrics
from ..evaluation.items import Item, conversation_items, image_cluster
from ..evaluation.measuring import StepChoice
from .adapter import ADAPTER_FOLDER
from .conversations import PlannedRows
from .training import ConversationTraining


@dataclass(frozen=True)
class InstructMeasurement:
    """One measurement."""

    step: int
    losses: tuple[float, ...]
    """Mean loss of each held-out row's learned tokens."""
    clusters: tuple[str, ...]
    """What each row's images are."""
    scores: tuple[float, ...] = ()
    """How right each answer is, 0 to 1."""
    answer_clusters: tuple[str, ...] = ()
    """What the images of each of these questions are."""

    @property
    def values(self) -> torch.Tensor:
        """What steps are compared by, one value per question or row, shape (N,)."""
        return torch.tensor(self.scores) if self.scores else -torch.tensor(self.losses)

    @property
    def groups(self) -> list[str]:
        """The image of each value."""
        return list(self.answer_clusters if self.scores else self.clusters)


class InstructMeasuring:
    """Measurements of one training, from its base on."""

    def __init__(
        self,
        config: InstructConfig,
        training: ConversationTraining,
        held_out: PlannedRows,
        accelerator: Accelerator,
        save: Callable[[Path], None],
    ) -> None:
        """save: writes the adapter as it is."""
        self.config, self.training, self.held_out, self.accelerator = config, training, held_out, accelerator
        self.save, self.started = save, False
        self.items = spread_items(held_out.rows, config.evaluate_answers)
        self.limit = answer_limit(training.vision, self.items) if self.items else 0

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        if not self.started:
            self.started = True
            self.begin(run, step)
        if step % self.config.evaluate_every and step < self.config.steps:
            return False
        if broadcast_first(step not in {one.step for one in measuring.load_measurements(run, InstructMeasurement)}):
            with_average(lambda: self.measure(run, step))
        return self.accelerator.is_main_process and has_stopped_improving(load_series(run), self.config.patience)

    def begin(self, run: Run, step: int) -> None:
        """Drops measurements of steps that are done again, and measures the base where it is not."""
        if self.accelerator.is_main_process:
            measuring.truncate_measurements(run, step if step > 1 else -1, InstructMeasurement)
        if broadcast_first(not load_series(run)):
            with disable_adapters(*self.training.parts.values()):
                self.measure(run, 0)

    def measure(self, run: Run, step: int) -> None:
        """Finds the loss of the held-out rows, asks their questions, writes both down and keeps the adapter as it is."""
        vision, module = self.training.vision, self.training.module
        module.eval()
        try:
            sums = self.training.row_losses(self.held_out)
            asked = ask_items(vision, self.items, max_new_tokens=self.limit, likelihood=False) if self.items else None
        finally:
            module.train()
        if not self.accelerator.is_main_process:
            return
        losses = [total / weight for total, weight in zip(sums, self.held_out.weights, strict=True)]
        one = InstructMeasurement(
            step,
            tuple(losses),
            tuple(image_cluster(row) for row in self.held_out.rows),
            tuple(asked.scores) if asked else (),
            tuple(item.cluster for item in self.items),
        )
        measuring.record_measurement(run, one, self.save)
        means = {"held_out_loss": sum(sums) / sum(self.held_out.weights)}
        words = f"step {step}  held-out loss {means['held_out_loss']:.4f}"
        if asked:
            means["answers_right"] = fmean(asked.scores)
            words += f"  answers right {means['answers_right']:.3f}"
            if cut := sum(asked.cut):
                words += f" ({cut} of {len(asked.cut)} cut at {self.limit} tokens)"
        run.append_metrics(step=step, **means)
        run.append_log(words)
        print(words, flush=True)

    def conclude(self, run: Run) -> None:
        """Keeps the best of the measured steps, if so wished, and says what would be right without looking."""
        if self.accelerator.is_main_process and self.config.keep == "best":
            choice = choose_step(load_series(run)[1:])
            measuring.keep_step(run, choice)
            print(measuring.describe_choice(choice))
        if not self.items or self.config.shard_base:
            return
        self.accelerator.wait_for_everyone()
        vision = self.training.vision
        state = load_file(run.adapter / ADAPTER_FOLDER / WEIGHTS)
        load_adapter_state(vision.model, {name: tensor.to(vision.device) for name, tensor in state.items()})
        self.training.module.eval()
        tuned = ask_items(vision, self.items, max_new_tokens=self.limit, likelihood=False)
        controls = control_metrics(vision, self.items, tuned, self.limit, self.config.seed)
        self.training.module.train()
        if self.accelerator.is_main_process:
            said = {name: own["mean"] for name, own in controls.items()}
            said = {"one answer to all" if name == "commonest answer" else name: mean for name, mean in said.items()}
            said |= {"right image": fmean(tuned.scores)}
            print("held-out answers right with " + ", ".join(f"{name} {mean:.3f}" for name, mean in said.items()))
            run.append_log(json.dumps({"controls": said}))


def spread_items(rows: list[Conversation], most: int) -> list[Item]:
    """Questions of rows, at most so many, from all over them."""
    items = [item for row in rows for item in conversation_items(row)]
    if not most or len(items) <= most:
        return items if most else []
    return [items[number * len(items) // most] for number in range(most)]


def load_series(run: Run) -> list[InstructMeasurement]:
    """All measurements, in order; the first is of the base (step 0)."""
    return measuring.load_measurements(run, InstructMeasurement)


def choose_step(series: list[InstructMeasurement]) -> StepChoice:
    """The step to keep."""
    own = {one.step: one.values for one in series}
    best = max(own, key=lambda step: (float(own[step].mean()), -step))
    groups = series[0].groups
    alike = [step for step in own if not measuring.is_significantly_below(own[step], own[best], groups)]
    return StepChoice(min(alike), best, tuple(sorted(alike)), tuple(sorted(alike)))


def has_stopped_improving(series: list[InstructMeasurement], patience: int) -> bool:
    """Whether none of the last `patience` measurements is surely above the best before them."""
    steps = series[1:]
    if not patience or len(steps) <= patience:
        return False
    best = max((one.values for one in steps[:-patience]), key=lambda values: float(values.mean()))
    return not any(measuring.is_significantly_below(best, one.values, one.groups) for one in steps[-patience:])
