"""Measurements while a subject is learned: likeness to photos that are held out, prompt fidelity, and which step was best.

Each measurement draws the same prompts from the same seeds, so that two steps are compared image by image. Likeness counts as the
share of the way from the base's images to real photos, prompt fidelity as the share of the base's that is lost; a step's score is the
first less the second. Steps that cannot be told apart from the best (paired bootstrap over prompts, 95 %) count as equal, and of
these the earliest is kept: it has been trained least.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from ...toolkit.core.files import append_line, write_text
from ...toolkit.core.records import as_type, read_rows
from ...toolkit.core.run_folder import Run
from ...toolkit.core.systems import retry_while_locked
from ...toolkit.metrics import clip as metrics
from ...toolkit.metrics import statistics
from ...toolkit.metrics.clip import ClipScorer

MeasurementT = TypeVar("MeasurementT")


@dataclass(frozen=True)
class Measurement:
    """One measurement: one value per image."""

    step: int
    likeness: tuple[float, ...]
    fidelity: tuple[float, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class StepChoice:
    """Which step was best."""

    step: int
    """The one that is kept."""
    best: int
    """The one with the highest score."""
    alike: tuple[int, ...]
    """Steps that cannot be told apart from it."""
    front: tuple[int, ...]
    """Steps that no other beats in both likeness and fidelity."""


class ValidationScorer:
    """Photos that are held out, prompts, and what a real photo scores."""

    def __init__(
        self,
        clip: ClipScorer,
        photos: Sequence[Image.Image],
        texts: Sequence[str],
        texts_without_token: Sequence[str],
        trained_on: Sequence[Image.Image],
    ) -> None:
        """texts: prompts, one an image; bare: the same without the rare token."""
        self.clip, self.photos, self.texts = clip, clip.embed_images(photos), tuple(texts)
        self.bare_texts = clip.embed_texts(texts_without_token)
        self.real = float(metrics.clip_i(clip.embed_images(trained_on), self.photos).mean())

    def measure(self, step: int, images: Sequence[Image.Image]) -> Measurement:
        """The images of all texts."""
        shown = self.clip.embed_images(images)
        likeness, fidelity = metrics.clip_i(shown, self.photos), metrics.clip_t(shown, self.bare_texts)
        return Measurement(step, tuple(likeness.tolist()), tuple(fidelity.tolist()), self.texts)


class PairScorer:
    """Pairs that are held out: what images that are made from their references are measured by."""

    def __init__(
        self,
        clip: ClipScorer,
        targets: Sequence[Image.Image],
        references: Sequence[Image.Image],
        captions: Sequence[str],
    ) -> None:
        """One of each for every pair; of several references the first."""
        self.clip, self.targets, self.references = clip, clip.embed_images(targets), clip.embed_images(references)
        self.captions = clip.embed_texts(captions)
        self.names = tuple(f"{number}: {caption}" for number, caption in enumerate(captions, 1))
        self.real = 1.0  # a target is itself
        self.unchanged = float(metrics.paired_similarity(self.references, self.targets).mean())
        """Likeness to the target of the reference, as if nothing were done."""

    def measure(self, step: int, images: Sequence[Image.Image]) -> tuple[Measurement, float]:
        """The images of all pairs, likeness being that to the pair's own target; then their mean likeness to their references."""
        shown = self.clip.embed_images(images)
        likeness, fidelity = metrics.paired_similarity(shown, self.targets), metrics.clip_t(shown, self.captions)
        faithfulness = float(metrics.paired_similarity(shown, self.references).mean())
        return Measurement(step, tuple(likeness.tolist()), tuple(fidelity.tolist()), self.names), faithfulness


@dataclass(frozen=True)
class Series:
    """All measurements of one run."""

    base: Measurement
    """Before the first step."""
    steps: tuple[Measurement, ...]
    real: float
    """Likeness of a real photo."""

    @classmethod
    def load(cls, run: Run) -> Series:
        """Those that a run has recorded."""
        base, *steps = load_measurements(run)
        real = [row["likeness_real"] for row in run.metrics() if "likeness_real" in row]
        return cls(base, tuple(steps), real[-1])

    def scores(self) -> dict[int, torch.Tensor]:
        """Step -> the score of each image: way closed to real photos, less the share of prompt fidelity lost."""
        before, fidelity = torch.tensor(self.base.likeness).mean(), torch.tensor(self.base.fidelity).mean()
        found = {}
        for one in self.steps:
            closed = (torch.tensor(one.likeness) - before) / (self.real - before).clamp(min=1e-6)
            lost = (fidelity - torch.tensor(one.fidelity)) / fidelity.abs().clamp(min=1e-6)
            found[one.step] = closed - lost
        return found


def choose_step(runs: Sequence[Series]) -> StepChoice:
    """The step to keep, by the images of all runs at once: one run, or those of a cross-validation."""
    scored = [run.scores() for run in runs]
    steps = [step for step in scored[0] if all(step in own for own in scored)]
    own = {step: torch.cat([one[step] for one in scored]) for step in steps}
    choice = choose_by_values(own, [prompt for run in runs for prompt in run.base.prompts])
    measured = [one for run in runs for one in run.steps]
    means = {
        step: (
            sum(sum(one.likeness) for one in measured if one.step == step),
            sum(sum(one.fidelity) for one in measured if one.step == step),
        )
        for step in steps
    }
    front = [
        s for s, (a, b) in means.items() if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in means.values())
    ]
    return replace(choice, front=tuple(sorted(front)))


def choose_by_values(values_N: dict[int, torch.Tensor], groups: Sequence[str]) -> StepChoice:
    """The step to keep by values (N,) of each, the more the better, that come in groups: images, or prompts."""
    best = max(values_N, key=lambda step: (float(values_N[step].mean()), -step))
    alike = [step for step in values_N if not is_significantly_below(values_N[step], values_N[best], groups)]
    return StepChoice(min(alike), best, tuple(sorted(alike)), tuple(sorted(alike)))


def is_significantly_below(one_N: torch.Tensor, other_N: torch.Tensor, prompts: Sequence[str]) -> bool:
    """Whether the first scores less, image by image, beyond what prompts by chance do."""
    return statistics.cluster_interval((one_N - other_N).tolist(), list(prompts))[1] < 0


def has_stopped_improving(run: Series, patience: int) -> bool:
    """Whether none of the last `patience` measurements is surely above the best before them."""
    return have_stopped_improving(list(run.scores().values()), run.base.prompts, patience)


def have_stopped_improving(values_N: list[torch.Tensor], groups: Sequence[str], patience: int) -> bool:
    """The same of the values (N,) of each measurement, the more the better; groups as for `choose_by_values`."""
    if not patience or len(values_N) <= patience:
        return False
    best = max(values_N[:-patience], key=lambda values: float(values.mean()))
    return not any(is_significantly_below(best, values, groups) for values in values_N[-patience:])


# ---------------------------------------------------------------------------------------------- in the run folder


def record_measurement(run: Run, one: Any, save: Callable[[Path], None]) -> None:
    """Writes a measurement down, and the adapter as it is."""
    save(snapshot_folder(run, one.step))
    append_line(measurements_file(run), json.dumps(asdict(one)))


def load_measurements(run: Run, kind: type[MeasurementT] = Measurement) -> list[MeasurementT]:
    """All measurements, in order; the first is of the base (step 0). kind: what a measurement of this method is."""
    found: dict[int, MeasurementT] = {}
    for row in read_rows(measurements_file(run)):
        if (one := as_type(kind, row)) is not None:
            found[one.step] = one
    return [found[step] for step in sorted(found)]


def truncate_measurements(run: Run, step: int, kind: type[Any] = Measurement) -> None:
    """Drops measurements after `step`, so that none stands twice after a resume."""
    kept = [one for one in load_measurements(run, kind) if one.step <= step]
    write_text(measurements_file(run), "".join(json.dumps(asdict(one)) + "\n" for one in kept))


def keep_step(run: Run, choice: StepChoice) -> None:
    """Makes the chosen step's adapter the run's own."""
    retry_while_locked(lambda: shutil.rmtree(run.adapter))
    shutil.copytree(snapshot_folder(run, choice.step), run.adapter)
    write_choice(run, choice)


def write_choice(run: Run, choice: StepChoice) -> None:
    """Writes down which step was best."""
    write_text(run.folder / "choice.json", json.dumps(asdict(choice), indent=1))


def measurements_file(run: Run) -> Path:
    """Where measurements stand, a line each."""
    return run.folder / "measured.jsonl"


def snapshot_folder(run: Run, step: int) -> Path:
    """The adapter as it was at a step."""
    return run.folder / "measured" / f"{step:06d}"


def describe_choice(choice: StepChoice) -> str:
    """The choice for people."""
    if len(choice.alike) == 1:
        return f"step {choice.step} is kept: it surely scores above every other that was measured"
    others = ", ".join(str(step) for step in choice.alike if step != choice.step)
    return f"step {choice.step} is kept; steps {others} cannot be told apart from it (the highest mean has step {choice.best})"
