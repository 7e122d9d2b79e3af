"""A subject measured by images that are drawn while it is learned, beside the validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ...toolkit.core.run_folder import Run
from ...toolkit.data.images import load_rgb
from ...toolkit.metrics.clip import ClipScorer
from ..evaluation import measuring
from ..evaluation.measuring import Measurement, StepChoice, ValidationScorer
from ..evaluation.subject import SubjectTest
from .step_measuring import StepMeasuring


class ImageMeasuring(StepMeasuring):
    """Likeness and prompt fidelity of images that are drawn, beside the validation loss."""

    kind = Measurement

    def has_stopped_improving(self, run: Run) -> bool:
        return measuring.has_stopped_improving(measuring.Series.load(run), self.config.patience)

    def choose_step(self, run: Run) -> StepChoice:
        return measuring.choose_step([measuring.Series.load(run)])

    def record(self, run: Run, one: Measurement, losses: dict[str, float], *, real: float, **more: float) -> None:
        """Writes a measurement and the losses beside it down, and keeps the adapter as it is. more: other figures, for the curves."""
        measuring.record_measurement(run, one, self.save)
        means = {"likeness": fmean(one.likeness), "prompt_fidelity": fmean(one.fidelity)} | more
        run.append_metrics(step=one.step, likeness_real=real, **means, **losses)
        said = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items())
        run.append_log(f"step {one.step}  {said}  validation loss {losses['validation_loss']:.4f}")
        if self.config.tracker != "none":
            self.accelerator.log(means | losses, step=one.step)


@dataclass(eq=False)
class SubjectMeasuring(ImageMeasuring):
    """Of a subject, in the scenes of the test prompts."""

    test: SubjectTest
    photos: Sequence[Path]
    """That likeness is measured by."""
    trained: Sequence[Path]
    """That are trained on."""
    scorer: ValidationScorer | None = None
    """Loaded with the first measurement, by the process that measures."""

    def measure(self, run: Run, step: int) -> None:
        """Draws the test prompts, writes their figures down and keeps the adapter as it is."""
        texts = self.test.texts(token=True)
        images = self.training.draw(texts, [self.config.seed + 5000 + number for number in range(len(texts))])
        losses, _ = self.loss.measure()
        if not self.accelerator.is_main_process:
            return
        self.scorer = self.scorer or self.load_scorer()
        self.record(run, self.scorer.measure(step, images), losses, real=self.scorer.real)

    def load_scorer(self) -> ValidationScorer:
        """What images are measured by."""
        return ValidationScorer(
            ClipScorer(self.config.evaluate_clip or None),
            [load_rgb(path) for path in self.photos],
            self.test.texts(token=True),
            self.test.texts(token=False),
            [load_rgb(path) for path in self.trained],
        )
