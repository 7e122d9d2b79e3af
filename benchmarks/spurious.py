"""Is FVAE-LoRA robust to what only happens to go with the answer? Groups as in Waterbirds, on the embedded vision tower.

    python benchmarks/spurious.py [--seeds 3] [--shares 0.95] [--threads 1] [--work FOLDER]
        [--out benchmarks/results/spurious.json]

The claim (Kumar et al. 2025, arXiv 2510.19640): worst-group accuracy above LoRA's, 75.9 against 75.5 on Waterbirds, 43.3 against 40.0 on
CelebA, 62.0 against 54.8 on Animals.

A question with two answers (one thing or three, a small one or a large one, with a smile or without a face) about 600 images of the
tiny world, each in one of two scenes. A share of the training images, 90 or 95 %, is in the scene that goes with the answer; of the 800
test images a quarter is in each of the four groups of answer and scene. Shape would be the plainest question and is not among them: the
embedded tower hardly knows shapes (circles from crosses: LoRA is right in 0.7 of images even where scenes tell nothing), so that
every way answers by the scene alone and is never right about the worst group. Colour is not either: there no way is ever wrong.

    head alone       a linear head on the base's features
    LoRA             rank 8; FVAE keeps as many numbers but for 640 (biases, and a square matrix in each layer)
    FVAE, relu       rank 8, as the paper has it, its own loss added to the task's
    FVAE, identity   our variant, which folds into LoRA
    whole tower      every weight

FVAE's options are the project's defaults. Its decoder and second encoder are trained and thrown away: it trains 17 times LoRA's numbers,
which no LoRA of these layers can have. All train a head as well, at the rate that is best for the head alone, with the same images,
batches, 150 steps of 16, one schedule. Groups are used by no training: the last step is taken. Each way's learning rate is the one with
the highest accuracy on 1,200 other images of a question that is not tested on (plain or striped), trained at 95 %, half of them in each
scene; from three, and on from there while the best is at an edge. Images drawn as those of the training are would tell nothing: the
scene alone is right in 95 % of them, and all ways at all rates score 95.5 to 96.

average     accuracy, all groups counting alike
worst       that of the group with the lowest
gap         average less worst
likely      accuracy where groups are as frequent as in training

A run is a question with a seed: other images, scenes, batches, start of the adapter. Differences from LoRA are taken run by run.
Intervals: bootstrap over runs.
Resumable: every training leaves one file in the work folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifier import (
    HEAD_ALONE,
    HEAD_WAY,
    WHOLE,
    AnswerCache,
    Chosen,
    Method,
    Rates,
    Towers,
    difference,
    format_interval,
    rates_slug,
    score_predictions,
    summary,
    train_head,
    write,
)
from few_shot_classifier import Images
from quiet import silence_libraries

from rankfold.toolkit.embedded import world

ANSWERS = {
    "count": ("one", "three"),
    "size": ("small", "large"),
    "face": ("none", "smiling"),
    "pattern": ("plain", "striped"),
}
SCENES = (("beach", "meadow"), ("night", "room"), ("snow", "desert"), ("sea", "city"))
CHOSEN_ON, TESTED_ON = "pattern", ("count", "size", "face")
CHOSEN_SEED = 103
CHOSEN_SHARE = 0.95
RANK, STEPS = 8, 150
TRAINING, TEST, VALIDATION = 600, 800, 1200
FVAE_RATES = (1e-3, 3e-3, 1e-2)
REFERENCE = "LoRA"
WAYS = {
    HEAD_ALONE: HEAD_WAY,
    REFERENCE: Method("lora", RANK, rates=(1e-3, 3e-3, 1e-2)),
    "FVAE, relu": Method("fvae", RANK, rates=FVAE_RATES),
    "FVAE, identity": Method("fvae", RANK, {"encoder_activation": "identity"}, rates=FVAE_RATES),
    "whole tower": Method(WHOLE, rates=(3e-5, 1e-4, 3e-4)),
}
FIGURES = {"average": 1, "worst": 1, "gap": -1, "likely": 1}  # and the sign of what is better


@dataclass(frozen=True)
class Question:
    """What is asked, the share of training images in the scene that goes with the answer, and the seed."""

    name: str
    share: float
    seed: int

    @property
    def scenes(self) -> tuple[str, str]:
        """The scenes that go with the two answers."""
        return SCENES[(list(ANSWERS).index(self.name) + self.seed) % len(SCENES)]


def thing_of(question: Question, answer: int, scene: int, rng: np.random.Generator) -> world.Thing:
    """A thing with this answer in this scene, all else at random."""
    several = question.name == "count"  # what is there three times is small and in the centre, so one is, too
    own = {
        "shape": str(rng.choice(world.SHAPES)),
        "colour": str(rng.choice(list(world.COLOURS))),
        "pattern": str(rng.choice(world.PATTERNS)),
        "face": str(rng.choice(world.FACES)),
        "size": "small" if several else str(rng.choice(world.SIZES)),
        "place": "centre" if several else str(rng.choice(list(world.PLACES))),
    }
    return world.Thing(**own | {"scene": question.scenes[scene], question.name: ANSWERS[question.name][answer]})


def draw_images(
    question: Question, count: int, stream: int, even: bool, preprocess: Callable
) -> tuple[Images, torch.Tensor]:
    """Fresh images with their answers, and whether each is in the scene of its answer; even: in half of them, in each group alike."""
    rng = np.random.default_rng((question.seed, stream, list(ANSWERS).index(question.name)))
    images, answers, matching = [], [], []
    for number in range(count):
        match = number % 4 < 2 if even else bool(rng.random() < question.share)
        answer = number % 2
        thing = thing_of(question, answer, answer if match else 1 - answer, rng)
        images.append(preprocess(world.draw(thing, rng)))
        answers.append(answer), matching.append(match)
    return Images(torch.stack(images), torch.tensor(answers)), torch.tensor(matching)


class Bench:
    """The towers, the images of each question, and what is known."""

    def __init__(self, work: Path) -> None:
        self.towers, self.kept = Towers(), AnswerCache(work)
        self.drawn = lru_cache(2)(partial(draw_images, preprocess=self.towers.preprocess))
        self.chosen = Chosen(WAYS, self.score)

    def score_predictions(self, name: str, rates: Rates, question: Question, test: Images) -> torch.Tensor:
        """1 where a test image is answered rightly after training, otherwise 0."""
        data, _ = self.drawn(question, TRAINING, 1, False)
        tower = self.towers.make_tower(WAYS[name], question.seed)
        return score_predictions(tower, train_head(tower, rates, data, STEPS, question.seed), test)

    def score(self, name: str, rates: Rates) -> float:
        """Accuracy on the question that is not tested on, in both scenes alike."""
        question = Question(CHOSEN_ON, CHOSEN_SHARE, CHOSEN_SEED)

        def accuracy() -> float:
            test, _ = self.drawn(question, VALIDATION, 2, True)
            return float(self.score_predictions(name, rates, question, test).mean())

        return self.kept.answer(f"even-{name}-{rates_slug(rates)}-{STEPS}", accuracy)

    def run(self, name: str, question: Question) -> dict[str, Any]:
        """All figures of one run, and the accuracy of each group."""
        rates, own = self.chosen.rates_of(name), f"{question.name}-{question.share:g}-{question.seed}"
        return self.kept.answer(
            f"{name}-{rates_slug(rates)}-{STEPS}-{own}", partial(self.figures, name, rates, question)
        )

    def figures(self, name: str, rates: Rates, question: Question) -> dict[str, Any]:
        """The same, by training."""
        test, matching = self.drawn(question, TEST, 3, True)
        correct = self.score_predictions(name, rates, question, test)
        groups = {
            f"{ANSWERS[question.name][answer]}, {question.scenes[answer if match else 1 - answer]}": float(
                correct[(test.classes == answer) & (matching == match)].mean()
            )
            for answer in (0, 1)
            for match in (True, False)
        }
        matched, unmatched = float(correct[matching].mean()), float(correct[~matching].mean())
        average, worst = (matched + unmatched) / 2, min(groups.values())
        likely = question.share * matched + (1 - question.share) * unmatched
        return {"average": average, "worst": worst, "gap": average - worst, "likely": likely, "groups": groups}


def result_row(name: str, share: float, runs: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """One way at one share: its figures over the runs."""
    row = {"way": name, "share": share, **facts} | {key: summary([run[key] for run in runs]) for key in FIGURES}
    each = len(runs) // len(TESTED_ON)
    row["worst_by_question"] = {
        question: statistics.fmean(run["worst"] for run in runs[n * each : (n + 1) * each])
        for n, question in enumerate(TESTED_ON)
    }
    return row | {"groups": [run["groups"] for run in runs]}


def differences_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way against LoRA, at each share and at the mean over them, since a run's test images are the same at every share."""
    found, shares = [], list(dict.fromkeys(row["share"] for row in rows))
    for name in (name for name in WAYS if name != REFERENCE):
        for among in [*([share] for share in shares), *([shares] if len(shares) > 1 else [])]:
            one = {"way": name, "reference": REFERENCE, "shares": among}
            for key, sign in FIGURES.items():
                own, base = (over_shares(rows, way, among, key) for way in (name, REFERENCE))
                one[key] = difference(own, base, sign)
            found.append(one)
    return found


def over_shares(rows: list[dict[str, Any]], way: str, shares: list[float], key: str) -> list[float]:
    """A figure of each run, the mean over the shares."""
    own = [row for row in rows if row["share"] in shares and row["way"] == way]
    return [statistics.fmean(values) for values in zip(*(row[key]["by_run"] for row in own), strict=True)]


def report(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """Prints both tables, in points of a hundred."""
    for row in rows:
        figures = "   ".join(f"{key} {format_interval(row[key])}" for key in FIGURES)
        print(f"{row['share']:g}  {row['way']:15} {row['learning_rate']:g}   {figures}")
    for one in differences:
        print(f"\n{one['way']} less {one['reference']}, shares {one['shares']}")
        for key in FIGURES:
            own = one[key]
            print(
                f"   {key:8} {format_interval(own):22} better {own['better']}, worse {own['worse']}: {own['verdict']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/spurious"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    bench = Bench(options.work)
    runs_of, rows = [(name, seed) for name in TESTED_ON for seed in range(options.seeds)], []
    facts = {name: bench.chosen.facts(name) | bench.towers.sizes(way) for name, way in WAYS.items()}
    print({name: own["tried"] for name, own in facts.items()}, flush=True)
    for share in options.shares:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for asked, seed in runs_of:
            question = Question(asked, share, seed)
            for name in WAYS:
                runs[name].append(bench.run(name, question))
            print(question, "worst", {name: round(own[-1]["worst"], 3) for name, own in runs.items()}, flush=True)
        rows += [result_row(name, share, own, facts[name]) for name, own in runs.items()]
    differences = differences_of(rows)
    report(rows, differences)
    settings = {"steps": STEPS, "runs": runs_of, "seconds": round(bench.kept.seconds)}
    write({"settings": settings, "rows": rows, "differences": differences}, options.out)


if __name__ == "__main__":
    main()
