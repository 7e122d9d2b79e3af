"""Which shift of the timesteps teaches a subject better: 1, or 3 as Stable Diffusion 3 samples with. On tiny-dit, the embedded flow model.

    python benchmarks/timestep_shift.py [--creatures 3] [--seeds 2] [--steps 300] [--shifts 1 3] [--out FILE.jsonl]

Each creature is learned from five captioned images, as in the demo, once with each shift and seed, in turn; the budget is the same.
Measured is what the demo measures: share of the distance to drawn images closed; scene and place as asked. Printed are the means and the
difference of each pair with a 95 % bootstrap interval over creatures. A line of FILE is one run; runs that are there are not done again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from demo_settings import write_captioned_folder

from rankfold import SubjectConfig, train
from rankfold.toolkit.core.files import append_line
from rankfold.toolkit.metrics.statistics import cluster_interval
from rankfold.training.embedded.demo import DEMO_SETTINGS, measure_before_and_after

FIRST = 2_000_640
FIGURES = ("closed", "scene_after", "place_after")


def measure(creature: int, seed: int, shift: float, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one creature."""
    settings = DEMO_SETTINGS["tiny-dit"] | {"steps": options.steps, "preview_every": 0, "timestep_shift": shift}
    images = write_captioned_folder(creature, options.work / str(creature))
    config = SubjectConfig(
        base="tiny-dit", images=images, out=options.work / "run", threads=options.threads, seed=seed, **settings
    )
    found = measure_before_and_after(train(config, overwrite=config.out.is_dir()), creature, seed=seed, each=2)
    return {"creature": creature, "seed": seed, "shift": shift} | {name: found[name] for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--creatures", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--shifts", type=float, nargs=2, default=[1.0, 3.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/timestep_shift"))
    parser.add_argument("--out", type=Path, default=Path("runs/timestep_shift.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.is_file() else []
    rows = {(row["creature"], row["seed"], row["shift"]): row for row in map(json.loads, lines)}
    cells = product(range(options.seeds), range(FIRST, FIRST + options.creatures), options.shifts)
    for seed, creature, shift in cells:
        if (creature, seed, shift) not in rows:
            rows[creature, seed, shift] = measure(creature, seed, shift, options)
            append_line(options.out, json.dumps(rows[creature, seed, shift]))
    first, second = options.shifts
    pairs = [
        (rows[c, s, first], rows[c, s, second]) for c, s, shift in rows if shift == first and (c, s, second) in rows
    ]
    for name in FIGURES:
        gains = [b[name] - a[name] for a, b in pairs]
        low, high = cluster_interval(gains, [str(a["creature"]) for a, _ in pairs])
        print(
            f"{name:12} shift {first:g}: {mean(a[name] for a, _ in pairs):.3f}  shift {second:g}: {mean(b[name] for _, b in pairs):.3f}  "
            f"difference {mean(gains):+.3f} [{low:+.3f}, {high:+.3f}]  ({len(pairs)} pairs)"
        )


if __name__ == "__main__":
    main()
