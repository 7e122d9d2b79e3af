"""A subject measured by the validation loss alone, while it is learned: without an image drawn, or a model to judge one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...toolkit.core.run_folder import Run
from ..evaluation import measuring
from ..evaluation.measuring import StepChoice
from .step_measuring import StepMeasuring

MIN_CLUSTERS = 3  # images, of which intervals can be over images


@dataclass(frozen=True)
class LossMeasurement:
    """One measurement."""

    step: int
    losses: tuple[tuple[float, ...], ...]
    """Of each held-out image, at each of the same noises and timesteps."""

    @property
    def values_N(self) -> torch.Tensor:
        """What steps are compared by, the more the better, of shape (N,)."""
        return -torch.tensor(self.losses).flatten()

    @property
    def groups(self) -> list[str]:
        """Images; of fewer than three the draws, so that the interval is one of noises and timesteps for just these images."""
        many = len(self.losses) >= MIN_CLUSTERS
        return [str(image if many else draw) for image, row in enumerate(self.losses) for draw in range(len(row))]


class LossMeasuring(StepMeasuring):
    """The validation loss, which --patience and --keep best go by."""

    kind = LossMeasurement

    def measure(self, run: Run, step: int) -> None:
        means, held_out_ND = self.loss.measure()
        if not self.accelerator.is_main_process:
            return
        one = LossMeasurement(step, tuple(map(tuple, held_out_ND.tolist())))
        measuring.record_measurement(run, one, self.save)
        run.append_metrics(step=step, **means)
        run.append_log(
            f"step {step}  validation loss {means['validation_loss']:.4f}  training loss {means['training_loss']:.4f}  "
            f"class loss {means['class_loss']:.4f}"
        )
        if self.config.tracker != "none":
            self.accelerator.log(means, step=step)

    def has_stopped_improving(self, run: Run) -> bool:
        series = measuring.load_measurements(run, LossMeasurement)
        values = [one.values_N for one in series[1:]]
        return measuring.have_stopped_improving(values, series[0].groups, self.config.patience)

    def choose_step(self, run: Run) -> StepChoice:
        steps = measuring.load_measurements(run, LossMeasurement)[1:]
        return measuring.choose_by_values({one.step: one.values_N for one in steps}, steps[0].groups)
