"""How much of the subject leaks into its class, with and without the two ways of preserving it.

    python benchmarks/preservation.py [--creatures 3] [--work FOLDER] [--out FILE.json]

The demo's training on creatures that no other benchmark uses, from five captioned images: alone, with --preservation-weight 1 (captions
without the token are held to what the untrained model says), and with --prior-weight 1 (50 class images). Asked are 16 images with the
token and 16 of the same prompts without it, the same seeds for all.

identity    share of the base model's distance to drawn images of the subject closed, with the token (CLIP-I, embedded open_clip)
leak        the same without the token: 0 is what the base model does
Intervals: bootstrap over the images of all creatures. seconds: training, relative to alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from demo_settings import write_captioned_folder

from rankfold import SubjectConfig, train
from rankfold.pipelines.generate import Recipe, denoise, sampling_pipeline
from rankfold.toolkit.embedded import world
from rankfold.toolkit.metrics.clip import ClipScorer, clip_i
from rankfold.toolkit.metrics.statistics import bootstrap_interval
from rankfold.training.embedded.demo import DEMO_TRAINING, prompt_for, scenes_and_places

FIRST = 2_000_800
WAYS = {
    "alone": {"preservation_weight": 0.0},
    "preservation": {"preservation_weight": 1.0},
    "class images": {"preservation_weight": 0.0, "prior_weight": 1.0},
}


def likeness(scorer: ClipScorer, references: torch.Tensor, adapters: tuple[str, ...], subject: str) -> torch.Tensor:
    """CLIP-I of each of 16 images of the subject."""
    pipe = sampling_pipeline(Recipe(prompt="", adapters=adapters, strengths=(1.0,) * len(adapters)))
    prompts = [prompt_for(subject, scene, place) for scene, place in scenes_and_places()]
    images = denoise(
        pipe,
        prompts,
        negative=[""] * len(prompts),
        seeds=list(range(900, 900 + len(prompts))),
        steps=25,
        guidance_scale=DEMO_TRAINING["guidance_scale"],
        width=64,
    )
    return clip_i(scorer.embed_images(images), references)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--creatures", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/preservation"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scorer = ClipScorer()
    found: dict[str, dict[str, list[torch.Tensor]]] = {name: {"identity": [], "leak": []} for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(options.creatures):
        creature = FIRST + number
        images = write_captioned_folder(creature, options.work / str(creature))
        references = scorer.embed_images([image for image, _ in world.subject_images(creature, 24, seed=2)])
        among = references @ references.T
        real = float(((among.sum(1) - 1) / (len(references) - 1)).mean())
        asked = {"identity": "sks creature", "leak": "creature"}
        base = {key: likeness(scorer, references, (), subject).mean() for key, subject in asked.items()}
        for name, settings in WAYS.items():
            out = options.work / "run"
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            quiet = {"preview_every": 0, "steps": 300, "threads": options.threads, "seed": number}
            run = train(SubjectConfig(images=images, out=out, **(DEMO_TRAINING | quiet | settings)))
            seconds[name].append(time.perf_counter() - start)
            for key, subject in asked.items():
                like = likeness(scorer, references, (str(run.adapter),), subject)
                found[name][key].append((like - base[key]) / (real - base[key]))
            print(creature, name, {k: round(float(v[-1].mean()), 2) for k, v in found[name].items()}, flush=True)
    report(found, seconds, options.out)


def report(found: dict[str, dict[str, list[torch.Tensor]]], seconds: dict[str, list[float]], out: Path | None) -> None:
    """Prints the table and writes it."""
    rows = []
    for name, own in found.items():
        row: dict[str, object] = {"way": name, "seconds": sum(seconds[name]) / sum(seconds["alone"])}
        text = f"{name:16} time {row['seconds']:.2f}"
        for key, values in own.items():
            low, high = bootstrap_interval(torch.cat(values))
            mean = float(torch.cat(values).mean())
            row |= {key: mean, f"{key}_interval": (low, high), f"{key}_by_creature": [float(v.mean()) for v in values]}
            text += f"  {key} {mean:.2f} ({low:.2f} to {high:.2f})"
        rows.append(row)
        print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
