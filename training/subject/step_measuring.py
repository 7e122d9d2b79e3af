"""Measurements of a subject while it is learned: when they are made, and which step's adapter is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator

from ...toolkit.adapters.attach import disable_adapters
from ...toolkit.core.run_folder import Run
from ..config.subject import SubjectConfig
from ..engine.processes import broadcast_first
from ..evaluation import measuring
from ..evaluation.measuring import StepChoice
from .training import ImageTraining
from .validation_loss import ValidationLoss


@dataclass(eq=False)
class StepMeasuring(ABC):
    """Measurements of one training, from its base on."""

    kind: ClassVar[type[Any]]
    """What a measurement is written down as."""
    config: SubjectConfig
    training: ImageTraining
    accelerator: Accelerator
    save: Callable[[Path], None]
    """Writes the adapter as it is."""

    def __post_init__(self) -> None:
        self.started = False
        self.loss = ValidationLoss(self.training, self.config.seed)

    @abstractmethod
    def measure(self, run: Run, step: int) -> None:
        """Measures, writes the figures down and keeps the adapter as it is."""

    @abstractmethod
    def has_stopped_improving(self, run: Run) -> bool:
        """Whether --patience is over."""

    @abstractmethod
    def choose_step(self, run: Run) -> StepChoice:
        """The best of the measured steps."""

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        if not self.started:
            self.started = True
            self.begin(run, step)
        if step % self.config.evaluate_every and step < self.config.steps:
            return False
        if broadcast_first(step not in {one.step for one in measuring.load_measurements(run, self.kind)}):
            with_average(lambda: self.measure(run, step))
        return self.accelerator.is_main_process and self.has_stopped_improving(run)

    def begin(self, run: Run, step: int) -> None:
        """Drops measurements of steps that are done again, and measures the base where it is not. step: that has been done."""
        if self.accelerator.is_main_process:
            measuring.truncate_measurements(run, step if step > 1 else -1, self.kind)
        if broadcast_first(not measuring.load_measurements(run, self.kind)):
            with disable_adapters(*self.training.parts.values()):
                self.measure(run, 0)

    def keep_best(self, run: Run) -> None:
        """Makes the best of the measured steps the run's adapter."""
        choice = self.choose_step(run)
        measuring.keep_step(run, choice)
        print(measuring.describe_choice(choice))
