"""The settings of `rankfold demo`, chosen on creatures that are neither the demo's nor any other benchmark's.

    python benchmarks/demo_settings.py [--base tiny] [--creatures 3] [--rates 3e-4 1e-3] [--steps 200 400 800] [--out FILE.json]

Each run learns one creature from five captioned images, as the demo does. Printed is the mean over the creatures of what
`measure_before_and_after` measures: share of the distance to drawn images closed, scene and place as asked; and seconds of training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import mean

import torch

from rankfold import SubjectConfig, train
from rankfold.toolkit.embedded import world
from rankfold.training.embedded.demo import DEMO_SETTINGS, measure_before_and_after, prompt_for

FIRST = 2_000_600


def write_captioned_folder(creature: int, folder: Path, count: int = 5) -> Path:
    """Folder with drawn images of a creature and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, thing) in enumerate(world.subject_images(creature, count, seed=0)):
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt_for("sks creature", thing.scene, thing.place), encoding="utf-8")
    return folder


def measure_creature(creature: int, rate: float, steps: int, options: argparse.Namespace) -> dict[str, float]:
    """Trains and measures one creature."""
    out = options.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    settings = DEMO_SETTINGS[options.base] | {
        "base": options.base,
        "learning_rate": rate,
        "steps": steps,
        "preview_every": 0,
        "adapter": options.adapter,
    }
    images = write_captioned_folder(creature, options.work / str(creature))
    start = time.perf_counter()
    run = train(SubjectConfig(images=images, out=out, threads=options.threads, seed=options.seed, **settings))
    seconds = time.perf_counter() - start
    return measure_before_and_after(run, creature, seed=options.seed, each=2) | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--creatures", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400, 800])
    parser.add_argument("--adapter", default="moslora")
    parser.add_argument("--base", default="tiny", choices=list(DEMO_SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/demo_settings"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for rate in options.rates:
        for steps in options.steps:
            found = [measure_creature(FIRST + n, rate, steps, options) for n in range(options.creatures)]
            row = {key: mean(f[key] for f in found) for key in ("closed", "scene_after", "place_after", "seconds")}
            rows.append(
                {"learning_rate": rate, "steps": steps} | row | {"closed_by_creature": [f["closed"] for f in found]}
            )
            print(
                f"rate {rate:g}  steps {steps:4}  closed {row['closed']:.2f}  scene {row['scene_after']:.2f}  "
                f"place {row['place_after']:.2f}  {row['seconds']:.0f} s",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
