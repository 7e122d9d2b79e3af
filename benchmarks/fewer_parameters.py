"""Does LoRATRF with a third fewer numbers do what LoRA does? And is it the filter, or would fewer numbers do for LoRA as well?

    python benchmarks/fewer_parameters.py [--seeds 5] [--threads 1] [--work FOLDER]
        [--out benchmarks/results/fewer_parameters.json]

The claim (Li et al. 2024, arXiv 2412.09827): better scores than low-rank baselines with 33.71 % fewer trained parameters. The paper is
about language, has no released code and no formula that could be had; what is tried is the project's reading of it, on the embedded
vision tower.

Questions about images of the tiny world: pattern, place and count (at the base's features a head alone is right in 0.6 to 0.75 of
images; scene and colour are no test, since there it always is). 600 images to train on, 600 others as the test.

    head alone           a linear head on the base's features
    LoRA, rank 8         the reference: 40,960 numbers
    LoRA, rank 5         the control: plain LoRA at 62.5 % of them
    LoRA, rank 1         shows whether the test can tell sizes at all: 12.5 %
    LoRATRF              the default reading (cosine), rank 3 and a filter of rank 1: 56 %
    LoRATRF, code        the other readings: a gate on the code of rank 5, 63 %
    LoRATRF, edit        a scale and a shift of the output, and rank 4, 62.5 %
    LoRATRF, subspace    an edit in a subspace of rank 1, and rank 4, 62.5 %

All train a head as well, at the rate that is best for the head alone, with the same images, batches, 100 steps of 16, one schedule. The
task vector is calibrated on the first batch, as in the project's loop. Each way's learning rate is chosen by accuracy on a question that
is not tested on (size), two seeds; from three rates, and on from there while the best is at an edge. A run is a question with a seed:
other images, batches, start of the adapter. Differences are taken run by run; intervals: bootstrap over runs.
Resumable: every training
leaves one file in the work folder.

"As good as" was given its meaning before the first run: the whole 95 % interval of the difference from LoRA at rank 8 above minus one
point of accuracy. That the gate on the code is compared with the control, too, was added when its accuracy was known.
"""

from __future__ import annotations

import argparse
import statistics
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from classifier import (
    HEAD_ALONE,
    HEAD_WAY,
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
from few_shot_classifier import draw_images
from quiet import silence_libraries

CHOSEN_ON, CHOSEN_SEEDS, TESTED_ON = "size", (50, 51), ("pattern", "place", "count")
STEPS, TRAINING, TEST = 100, 600, 600
MARGIN = 0.01
RATES = (1e-3, 3e-3, 1e-2)
REFERENCE, CONTROL, LEAST = "LoRA, rank 8", "LoRA, rank 5", "LoRA, rank 1"
FILTERED, GATED = "LoRATRF", "LoRATRF, code"
WAYS = {
    HEAD_ALONE: HEAD_WAY,
    REFERENCE: Method("lora", 8, rates=RATES),
    CONTROL: Method("lora", 5, rates=RATES),
    LEAST: Method("lora", 1, rates=RATES),
    FILTERED: Method("loratrf", 3, {"filter_r": "1"}, RATES),
    GATED: Method("loratrf", 5, {"filter": "code"}, RATES),
    "LoRATRF, edit": Method("loratrf", 4, {"filter": "edit"}, RATES),
    "LoRATRF, subspace": Method("loratrf", 4, {"filter": "subspace", "filter_r": "1"}, RATES),
}
PAIRS = (
    *((way, REFERENCE) for way in WAYS if way != REFERENCE),
    (FILTERED, CONTROL),
    (FILTERED, LEAST),
    (GATED, CONTROL),
)


class Bench:
    """The towers, the images of each question, and what is known."""

    def __init__(self, work: Path) -> None:
        self.towers, self.kept = Towers(), AnswerCache(work)
        self.drawn = lru_cache(4)(partial(draw_images, preprocess=self.towers.preprocess))
        self.chosen = Chosen(WAYS, self.score)

    def accuracy(self, name: str, rates: Rates, question: str, seed: int) -> float:
        """Accuracy on the test images of a question after training."""

        def measure() -> float:
            tower, data = self.towers.make_tower(WAYS[name], seed), self.drawn(question, TRAINING, 100 + seed)
            head = train_head(tower, rates, data, STEPS, seed)
            return float(score_predictions(tower, head, self.drawn(question, TEST, 4)).mean())

        return self.kept.answer(f"{name}-{rates_slug(rates)}-{STEPS}-{question}-{seed}", measure)

    def score(self, name: str, rates: Rates) -> float:
        """Accuracy on the question that is not tested on."""
        return statistics.fmean(self.accuracy(name, rates, CHOSEN_ON, seed) for seed in CHOSEN_SEEDS)


def of_each_question(values: list[float]) -> dict[str, float]:
    """Mean of the runs of each question."""
    each = len(values) // len(TESTED_ON)
    return {name: statistics.fmean(values[n * each : (n + 1) * each]) for n, name in enumerate(TESTED_ON)}


def result_row(name: str, values: list[float], facts: dict[str, Any], whole: int) -> dict[str, Any]:
    """One way: its accuracy over the runs, and its size beside the reference's."""
    row = {"way": name, **facts, "share_of_numbers": facts["trained_numbers"] / whole}
    return row | {"accuracy": summary(values) | {"by_question": of_each_question(values)}}


def compare_methods(way: str, reference: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Paired difference of one way from another, and whether it is as good but for the margin."""
    own = difference(found[way], found[reference])
    own |= {"by_question": of_each_question(own["by_run"]), "as_good": own["interval"][0] > -MARGIN}
    return {"way": way, "reference": reference, "accuracy": own}


def report(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """Prints both tables, in points of a hundred."""
    for row in rows:
        questions = {name: round(value, 3) for name, value in row["accuracy"]["by_question"].items()}
        size = f"{row['trained_numbers']:7,} ({row['share_of_numbers']:.1%})"
        print(
            f"{row['way']:18} {size:16} rate {row['learning_rate']:g}  {format_interval(row['accuracy'])}  {questions}"
        )
    for one in differences:
        own = one["accuracy"]
        questions = {name: round(100 * value, 1) for name, value in own["by_question"].items()}
        word = f"{own['verdict']}, {'as good' if own['as_good'] else 'not shown to be as good'}"
        pair = f"{one['way']} less {one['reference']}"
        print(f"{pair:36} {format_interval(own):20} better {own['better']}, worse {own['worse']}: {word}  {questions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/fewer_parameters"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    bench, facts = Bench(options.work), {}
    for name, way in WAYS.items():
        facts[name] = bench.chosen.facts(name) | bench.towers.sizes(way)
        print(name, facts[name], flush=True)
    runs = [(question, seed) for question in TESTED_ON for seed in range(options.seeds)]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for question, seed in runs:
        for name in WAYS:
            found[name].append(bench.accuracy(name, bench.chosen.rates_of(name), question, seed))
        own = {name: round(values[-1], 3) for name, values in found.items()}
        print(f"{question} seed {seed} {own}", flush=True)
    whole = facts[REFERENCE]["trained_numbers"]
    rows = [result_row(name, values, facts[name], whole) for name, values in found.items()]
    differences = [compare_methods(way, reference, found) for way, reference in PAIRS]
    report(rows, differences)
    settings = {"steps": STEPS, "runs": runs, "margin": MARGIN, "seconds": round(bench.kept.seconds)}
    write({"settings": settings, "rows": rows, "differences": differences}, options.out)


if __name__ == "__main__":
    main()
