"""Is MoSLoRA ahead of LoRA, and is that the mixer's learning? The two questions that benchmarks/mixer.py left open, with enough seeds.

    python benchmarks/mixer_confirm.py [--threads 1] [--work FOLDER] [--out benchmarks/results/mixer_confirm.json]

Written down before any of its cells was run; benchmarks/results/mixer.json is the pilot.

Setting     that of benchmarks/mixer.py at rank 8, where the pilot gave LoRA, LoRA of one rank more and MoSLoRA with an orthogonal start the
            same rate, 0.01; the frozen mixer, which got 0.02 and was better at 0.01 on the pilot's seeds, gets 0.01, too. 60 steps;
            accuracy on 200 held-out images.
Headroom    in the pilot LoRA was right in 87 %, the best way in 96 %, and guessing is 50 %.
Seeds       1000 to 1047, none of which the pilot or its choice of rates has used; all of them are run, whatever comes.
Power       the paired differences of the pilot have a standard deviation of 16 points, so that 48 seeds find a difference of 7.1 points in
            80 of 100 trials (2.5 % two-sided). The pilot's 9 points can be decided. The paper's 0.5 to 1.7 points can not: for 1.7, 840
            seeds are needed. They can be excluded only if MoSLoRA turns out to be behind.
Questions   1. MoSLoRA, orthogonal, less LoRA. 2. MoSLoRA, orthogonal, less the mixer that stays frozen.
            Each is a mean over the seeds of the difference in accuracy, with a bootstrap interval of 97.5 %, for they are two: better or
            worse where it excludes zero, and undecided otherwise, with the interval as what is still possible.
Beside      LoRA of one rank more, which has more numbers than MoSLoRA, by the same interval, as a description.

Resumable: every training leaves one file in the work folder, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from mixer import FROZEN, LEARNED, LORA, MORE, STEPS, Cell, run_cell
from quiet import silence_libraries

from rankfold.toolkit.metrics.statistics import bootstrap_interval

RANK, RATE = 8, 1e-2
SEEDS = range(1000, 1048)
WAYS = (LORA, MORE, LEARNED, FROZEN)
QUESTIONS = ((LEARNED, LORA), (LEARNED, FROZEN))
DESCRIBED = ((LEARNED, MORE), (MORE, LORA), (FROZEN, LORA))
LEVEL = 1 - 0.05 / len(QUESTIONS)


def accuracies(seeds: range, work: Path) -> dict[str, list[float]]:
    """Accuracy at the end of every way, by seed; the ways take turns, so that what is cut off is whole."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in seeds:
        for way in WAYS:
            figures = run_cell(Cell(way, RANK, RATE, seed), work)["figures"]
            found[way].append(figures[str(STEPS)]["accuracy"])
    return found


def difference(way: str, other: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """The mean difference of two ways, seed by seed, its interval, and what that says."""
    differences = [a - b for a, b in zip(found[way], found[other], strict=True)]
    low, high = bootstrap_interval(torch.tensor(differences), level=LEVEL, draws=20_000)
    return {
        "way": way,
        "reference": other,
        "mean": statistics.fmean(differences),
        "interval": (low, high),
        "standard_deviation": statistics.stdev(differences),
        "better": sum(d > 0 for d in differences),
        "worse": sum(d < 0 for d in differences),
        "verdict": "better" if low > 0 else "worse" if high < 0 else "undecided",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer are a trial, and no result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/mixer_confirm"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    found = accuracies(SEEDS[: options.seeds], options.work)
    ways = {
        way: {"mean": statistics.fmean(own), "interval": bootstrap_interval(torch.tensor(own), draws=20_000)}
        | {"by_seed": own}
        for way, own in found.items()
    }
    for way, own in ways.items():
        low, high = own["interval"]
        print(f"{way:24} {own['mean']:.3f} ({low:.3f} to {high:.3f})")
    compared = {"questions": QUESTIONS, "described": DESCRIBED}
    tables = {name: [difference(*pair, found) for pair in pairs] for name, pairs in compared.items()}
    for name, rows in tables.items():
        for row in rows:
            low, high = row["interval"]
            print(
                f"{name:10} {row['way']} less {row['reference']}: {row['mean']:.3f} ({low:.3f} to {high:.3f}), ", end=""
            )
            print(f"better on {row['better']}, worse on {row['worse']}: {row['verdict']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "rank": RANK,
            "learning_rate": RATE,
            "steps": STEPS,
            "seeds": [*SEEDS[: options.seeds]],
            "level": LEVEL,
        }
        text = json.dumps({"settings": settings, "ways": ways} | tables, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
