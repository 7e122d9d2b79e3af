"""A subject measured while it is learned: which photos for, when, and which step's adapter is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from accelerate import Accelerator

from ...toolkit.adapters.attach import disable_adapters
from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.data.images import load_rgb
from ...toolkit.data.subjects import Sample, find_samples
from ...toolkit.diffusion.load import EMBEDDED
from ...toolkit.metrics.clip import ClipScorer
from ..config.subject import NO_PROMPTS, SubjectConfig
from ..engine.processes import broadcast_first
from ..evaluation import measuring
from ..evaluation.measuring import Measurement, PairScorer, StepChoice, ValidationScorer
from ..evaluation.subject import SubjectTest, read_prompts
from .previews import load_pairs
from .training import ImageTraining
from .validation_loss import ValidationLoss

MIN_PHOTOS = 4  # of which one can be held out
MEASURED_PAIRS = 16  # of the held-out pairs that are drawn


def split_measured_photos(config: SubjectConfig, samples: list[Sample]) -> tuple[list[Sample], list[Path]]:
    """The samples to train on, and the photos that likeness is measured by.

    Raises:
        UserError: when there are too few to hold one out, or one that shall be held out is not there.
    """
    if not config.evaluate_every:
        return samples, []
    if config.evaluate_images is not None:
        found = find_samples(config.evaluate_images, skip_bad=config.skip_bad, option="--evaluate-images")
        return samples, [sample.path for sample in found]
    files = sorted({sample.path for sample in samples})
    if config.hold_out:
        named = [path for path in files if path.name in config.hold_out]
        if len(named) != len(set(config.hold_out)) or len(named) == len(files):
            raise UserError(
                f"--hold-out {' '.join(config.hold_out)} must name photos of --images, and leave some to train on."
            )
        return [sample for sample in samples if sample.path not in named], named
    if len(files) < MIN_PHOTOS:
        raise UserError(
            f"--images holds {len(files)} photos, too few to hold one out for --evaluate-every: add photos up to {MIN_PHOTOS}, or give "
            "others with --evaluate-images."
        )
    out = set(Random(f"{config.seed}/measured by").sample(files, max(1, len(files) // 5)))
    return [sample for sample in samples if sample.path not in out], sorted(out)


def measured_pairs(config: SubjectConfig, held_out: Sequence[Sample]) -> list[Sample]:
    """The held-out images with references, of which the first are drawn and measured; none where none are drawn.

    Raises:
        UserError: for held-out images of which some have references and some have none, and prompts beside them.
    """
    pairs = [sample for sample in held_out if sample.references]
    if not pairs or config.evaluate_prompts == NO_PROMPTS:
        return []
    if config.evaluate_prompts:
        raise UserError(
            f"--evaluate-prompts {config.evaluate_prompts} is of subjects: images with references are measured by their captions. Leave "
            "it out, or say none, which measures the validation loss alone."
        )
    return pairs[:MEASURED_PAIRS]


def held_out_samples(config: SubjectConfig, samples: list[Sample]) -> list[Sample]:
    """The photos that likeness is measured by, with their captions; none where nothing is measured."""
    if not config.evaluate_every:
        return []
    if config.evaluate_images is not None:
        return find_samples(config.evaluate_images, skip_bad=config.skip_bad, option="--evaluate-images")
    _, photos = split_measured_photos(config, samples)
    return [sample for sample in samples if sample.path in photos and not sample.flip]


def measured_prompts(config: SubjectConfig) -> SubjectTest | None:
    """The prompts that are measured, or None where none are."""
    if not config.evaluate_every or config.evaluate_prompts == NO_PROMPTS:
        return None
    name = config.evaluate_prompts or ("world" if config.base in EMBEDDED else "object")
    return SubjectTest(read_prompts(name), (), config.token, config.class_noun)


class StepMeasuring(ABC):
    """Measurements of one training, from its base on."""

    kind: type[Any]
    """What a measurement is written down as."""

    def __init__(
        self,
        config: SubjectConfig,
        training: ImageTraining,
        accelerator: Accelerator,
        save: Callable[[Path], None],
    ) -> None:
        """save: writes the adapter as it is."""
        self.config, self.training, self.accelerator, self.save = config, training, accelerator, save
        self.started = False
        self.loss = ValidationLoss(training, config.seed, config.class_prompt)

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


class SubjectMeasuring(ImageMeasuring):
    """Of a subject, in the scenes of the test prompts."""

    def __init__(
        self,
        config: SubjectConfig,
        training: ImageTraining,
        accelerator: Accelerator,
        save: Callable[[Path], None],
        *,
        test: SubjectTest,
        photos: Sequence[Path],
        trained: Sequence[Path],
    ) -> None:
        """photos: that likeness is measured by; trained: that are trained on."""
        super().__init__(config, training, accelerator, save)
        self.test, self.photos, self.trained = test, photos, trained
        self.scorer: ValidationScorer | None = None
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


class EditMeasuring(ImageMeasuring):
    """Of images made from the references of held-out pairs: likeness to the target, and to the reference."""

    def __init__(
        self,
        config: SubjectConfig,
        training: ImageTraining,
        accelerator: Accelerator,
        save: Callable[[Path], None],
        pairs: Sequence[Sample],
    ) -> None:
        super().__init__(config, training, accelerator, save)
        self.pairs = pairs
        self.scorer: PairScorer | None = None

    def measure(self, run: Run, step: int) -> None:
        """Draws the pairs, writes their figures down and keeps the adapter as it is."""
        captions = [sample.caption or "" for sample in self.pairs]
        images = self.training.draw(captions, [self.config.seed + 5000 + at for at in range(len(captions))], self.pairs)
        losses, _ = self.loss.measure()
        if not self.accelerator.is_main_process:
            return
        self.scorer = self.scorer or PairScorer(
            ClipScorer(self.config.evaluate_clip or None),
            *load_pairs(self.config, self.pairs, self.training.model),
            captions,
        )
        one, faithfulness = self.scorer.measure(step, images)
        more = {"faithfulness": faithfulness, "likeness_unchanged": self.scorer.unchanged}
        self.record(run, one, losses, real=self.scorer.real, **more)
