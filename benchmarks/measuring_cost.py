"""What measuring costs: the metrics of 100 images, and a demo's training with measurements over one without.

    python benchmarks/measuring_cost.py [--rounds 3] [--threads 2] [--out FILE.json]

metrics: seconds for likeness, prompt fidelity, diversity, drift, copies and their intervals of 100 images of the embedded model.
training: the demo's training (300 steps) with --evaluate-every 100 over without, in alternation; median of the rounds, with all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from demo_settings import write_captioned_folder

from rankfold import SubjectConfig, train
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics import clip as metrics
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.training.embedded.demo import DEMO_TRAINING
from rankfold.training.evaluation.subject import mean_with_interval

CREATURE = 2_001_200


def metrics_seconds(clip: ClipScorer) -> float:
    """All figures of 100 images against 20 photos."""
    images = [image for image, _ in world.subject_images(CREATURE, 100, seed=3)]
    photos = [image for image, _ in world.subject_images(CREATURE, 20, seed=4)]
    prompts = [f"a creature {text}" for text in world.SCENES.values()] * 13
    begin = time.perf_counter()
    shown, real, wanted = clip.embed_images(images), clip.embed_images(photos), clip.embed_texts(prompts[:100])
    for values in (
        metrics.clip_i(shown, real),
        metrics.clip_t(shown, wanted),
        metrics.diversity(shown),
        metrics.drift(shown, shown.flip(0)),
        metrics.nearest_similarity(shown, real),
    ):
        mean_with_interval(values, prompts[:100])
    return time.perf_counter() - begin


def training_seconds(images: Path, out: Path, threads: int, every: int) -> float:
    """One training."""
    shutil.rmtree(out, ignore_errors=True)
    held = images.parent / "held"
    begin = time.perf_counter()
    train(
        SubjectConfig(
            images=images,
            out=out,
            threads=threads,
            steps=300,
            evaluate_every=every,
            evaluate_images=held if every else None,
            **DEMO_TRAINING,
        )
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/measuring_cost"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = write_captioned_folder(CREATURE, options.work / "photos")
    write_captioned_folder(CREATURE, options.work / "held")
    clip = ClipScorer()
    metrics_seconds(clip)
    seconds = [metrics_seconds(clip) for _ in range(options.rounds)]
    ratios = []
    for _ in range(options.rounds):
        bare = training_seconds(images, options.work / "run", options.threads, 0)
        ratios.append(training_seconds(images, options.work / "run", options.threads, 100) / bare)
    found = {
        "metrics_seconds": statistics.median(seconds),
        "metrics_all": seconds,
        "training_ratio": statistics.median(ratios),
        "training_all": ratios,
        "threads": options.threads,
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
