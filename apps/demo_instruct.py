"""`rankfold demo instruct`: a vision-language model learns a task, offline, and shows what it saw, learned and forgot."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..toolkit.texts import lines_of
from .options import parse, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class DemoInstructConfig:
    """Teaches the embedded vision-language model a task that it cannot do."""

    out: Path = Path("runs/demo-instruct")
    """Folder of data, runs and answers."""
    steps: int = 150
    """Training steps of the new task alone; with replay a third more."""
    adapter: str = "moslora"
    """Adapter variant."""
    threads: int = 1
    """Torch threads."""
    seed: int = 0
    """Seed of pictures and training."""


def demo_instruct(words: list[str]) -> None:
    config = parse(DemoInstructConfig, words, "demo instruct")
    quiet_libraries()
    run_demo_instruct(config)


def run_demo_instruct(config: DemoInstructConfig) -> dict[str, Any]:
    """Trains twice, measures and prints; returns the figures of both runs."""
    import torch

    torch.set_num_threads(config.threads)
    from ..training.demo_instruct import QUESTION, judged, tune, write_demo_data

    start = time.time()
    files = write_demo_data(config.out / "data", seed=config.seed)
    settings = {"adapter": config.adapter, "threads": config.threads, "seed": config.seed}
    print(f"Teaching the embedded model to answer '{QUESTION}' from 400 pictures ({files['train']})")
    found: dict[str, Any] = {}
    for name, steps in (("alone", config.steps), ("replay", config.steps * 4 // 3)):
        run = tune(files, config.out / name, replay=name == "replay", steps=steps, **settings)
        found[name] = judged(run, files)
    print_answers(config.out / "replay" / "answers.jsonl")
    print_figures(found)
    print(f"\neverything in {time.time() - start:.0f} s; all figures: {config.out / 'replay' / 'report.txt'}")
    print(
        f'Next: rankfold chat --run {config.out / "replay"} --image {files["train"].parent}/pictures/1-00000.png --compare "{QUESTION}"'
    )
    print("      rankfold train instruct --base llava-hf/llava-1.5-7b-hf --data YOUR.json --images FOLDER")
    return found


def print_answers(file: Path, count: int = 6) -> None:
    """The first answers before and after."""
    print(f"\n{'picture':>12}  {'right':6} {'before':32} after")
    for line in lines_of(file)[:count]:
        row = json.loads(line)
        print(f"{row['place'].split(', ')[1]:>12}  {row['right']:6} {row['base'][:30]:32} {row['tuned'][:30]}")


def print_figures(found: dict[str, Any]) -> None:
    """What was learned, seen, forgotten and kept."""
    alone, replay = found["alone"], found["replay"]
    shown = lambda own: f"{own['mean']:5.1%} ({own['low']:.1%} to {own['high']:.1%})"  # noqa: E731
    print(f"\n{'':34} {'new task alone':28} with a quarter of old questions")
    for words, pick in (
        ("new task, before", lambda f: f["base"]["accuracy"]),
        ("new task, after", lambda f: f["tuned"]["accuracy"]),
        ("  with another row's picture", lambda f: f["controls"]["another row's picture"]),
        ("  with a blank picture", lambda f: f["controls"]["blank picture"]),
        ("old questions, before", lambda f: f["retention"]["base"]),
        ("old questions, after", lambda f: f["retention"]["tuned"]),
    ):
        print(f"{words:34} {shown(pick(alone)):28} {shown(pick(replay))}")
    for split, own in replay["retention"]["splits"].items():
        print(
            f"  {split:32} {alone['retention']['splits'][split]['tuned']:5.1%} {'':22} {own['tuned']:5.1%}   (before {own['base']:.1%})"
        )
    print(f"verdict on the new task: {replay['compared']['verdict']} (McNemar p {replay['compared']['mcnemar_p']:.1g})")
