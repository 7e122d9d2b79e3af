"""Measurements while a subject is learned: likeness to photos that are held out, prompt fidelity, and which step was best.

Each measurement draws the same prompts from the same seeds, so that two steps are compared picture by picture. Likeness counts as the
share of the way from the base's pictures to real photos, prompt fidelity as the share of the base's that is lost; a step's score is the
first less the second. Steps that cannot be told apart from the best (paired bootstrap over prompts, 95 %) count as equal, and of
these the earliest is kept: it has been trained least.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from ...toolkit.core.files import append_line, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.core.systems import patiently
from ...toolkit.metrics import clip as metrics
from ...toolkit.metrics import statistics
from ...toolkit.metrics.clip import ClipScorer


@dataclass(frozen=True)
class Measured:
    """One measurement: a value a picture."""

    step: int
    likeness: tuple[float, ...]
    fidelity: tuple[float, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Which step was best."""

    step: int
    """The one that is kept."""
    best: int
    """The one with the highest score."""
    alike: tuple[int, ...]
    """Steps that cannot be told apart from it."""
    front: tuple[int, ...]
    """Steps that no other beats in both likeness and fidelity."""


class Yardstick:
    """Photos that are held out, prompts, and what a real photo scores."""

    def __init__(
        self,
        clip: ClipScorer,
        photos: Sequence[Image.Image],
        texts: Sequence[str],
        bare: Sequence[str],
        trained_on: Sequence[Image.Image],
    ) -> None:
        """texts: prompts, one a picture; bare: the same without the rare token."""
        self.clip, self.photos, self.texts = clip, clip.pictures(photos), tuple(texts)
        self.wanted = clip.texts(bare)
        self.real = float(metrics.clip_i(clip.pictures(trained_on), self.photos).mean())

    def measure(self, step: int, pictures: Sequence[Image.Image]) -> Measured:
        """The pictures of all texts."""
        shown = self.clip.pictures(pictures)
        likeness, fidelity = metrics.clip_i(shown, self.photos), metrics.clip_t(shown, self.wanted)
        return Measured(step, tuple(likeness.tolist()), tuple(fidelity.tolist()), self.texts)


@dataclass(frozen=True)
class Series:
    """All measurements of one run."""

    base: Measured
    """Before the first step."""
    steps: tuple[Measured, ...]
    real: float
    """Likeness of a real photo."""

    @classmethod
    def of(cls, run: Run) -> Series:
        """Those that a run has recorded."""
        base, *steps = recorded(run)
        real = [row["likeness_real"] for row in run.metrics() if "likeness_real" in row]
        return cls(base, tuple(steps), real[-1])

    def scores(self) -> dict[int, torch.Tensor]:
        """Step -> the score of each picture: way closed to real photos, less the share of prompt fidelity lost."""
        before, fidelity = torch.tensor(self.base.likeness).mean(), torch.tensor(self.base.fidelity).mean()
        found = {}
        for one in self.steps:
            closed = (torch.tensor(one.likeness) - before) / (self.real - before).clamp(min=1e-6)
            lost = (fidelity - torch.tensor(one.fidelity)) / fidelity.abs().clamp(min=1e-6)
            found[one.step] = closed - lost
        return found


def choose(runs: Sequence[Series]) -> Choice:
    """The step to keep, by the pictures of all runs at once: one run, or those of a cross-validation."""
    scored = [run.scores() for run in runs]
    steps = [step for step in scored[0] if all(step in own for own in scored)]
    own = {step: torch.cat([one[step] for one in scored]) for step in steps}
    prompts = [prompt for run in runs for prompt in run.base.prompts]
    best = max(own, key=lambda step: (float(own[step].mean()), -step))
    alike = [step for step in own if not surely_below(own[step], own[best], prompts)]
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
    return Choice(min(alike), best, tuple(sorted(alike)), tuple(sorted(front)))


def surely_below(one: torch.Tensor, other: torch.Tensor, prompts: Sequence[str]) -> bool:
    """Whether the first scores less, picture by picture, beyond what prompts by chance do."""
    return statistics.cluster_interval((one - other).tolist(), list(prompts))[1] < 0


def no_more_gain(run: Series, patience: int) -> bool:
    """Whether none of the last `patience` measurements is surely above the best before them."""
    if not patience or len(run.steps) <= patience:
        return False
    own = list(run.scores().values())
    best = max(own[:-patience], key=lambda values: float(values.mean()))
    return not any(surely_below(best, values, run.base.prompts) for values in own[-patience:])


# ---------------------------------------------------------------------------------------------- in the run folder


def record(run: Run, one: Measured, save: Callable[[Path], None]) -> None:
    """Writes a measurement down, and the adapter as it is."""
    save(snapshot(run, one.step))
    append_line(file_of(run), json.dumps(asdict(one)))


def recorded(run: Run) -> list[Measured]:
    """All measurements, in order; the first is of the base (step 0)."""
    found: dict[int, Measured] = {}
    for line in file_of(run).read_text(encoding="utf-8").splitlines() if file_of(run).is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a killed process left half written
        found[row["step"]] = Measured(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
    return [found[step] for step in sorted(found)]


def cut(run: Run, step: int) -> None:
    """Drops measurements behind `step`, so that none stands twice after a resume."""
    kept = [one for one in recorded(run) if one.step <= step]
    write_text(file_of(run), "".join(json.dumps(asdict(one)) + "\n" for one in kept))


def keep(run: Run, choice: Choice) -> None:
    """Makes the chosen step's adapter the run's own."""
    patiently(lambda: shutil.rmtree(run.adapter))
    shutil.copytree(snapshot(run, choice.step), run.adapter)
    write_choice(run, choice)


def write_choice(run: Run, choice: Choice) -> None:
    """Writes down which step was best."""
    write_text(run.folder / "choice.json", json.dumps(asdict(choice), indent=1))


def file_of(run: Run) -> Path:
    """Where measurements stand, a line each."""
    return run.folder / "measured.jsonl"


def snapshot(run: Run, step: int) -> Path:
    """The adapter as it was at a step."""
    return run.folder / "measured" / f"{step:06d}"


def told(choice: Choice) -> str:
    """The choice for people."""
    if len(choice.alike) == 1:
        return f"step {choice.step} is kept: it surely scores above every other that was measured"
    others = ", ".join(str(step) for step in choice.alike if step != choice.step)
    return f"step {choice.step} is kept; steps {others} cannot be told apart from it (the highest mean has step {choice.best})"
