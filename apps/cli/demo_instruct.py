"""`rankfold demo instruct`: a vision-language model learns a task, offline, and shows what it saw, learned and forgot."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.core.texts import read_lines
from .options import OverwriteOption, parse_options
from .outcome import print_outcome


@dataclass(frozen=True, kw_only=True)
class DemoInstructConfig(OverwriteOption):
    """Teaches the embedded vision-language model a task that it cannot do."""

    out: Path = Path("runs/demo-instruct")
    """Folder of data, runs and answers."""
    steps: Annotated[int, Ge(1)] = 150
    """Training steps of the new task alone; with replay a third more."""
    adapter: str = "moslora"
    """Adapter method."""
    threads: Annotated[int, Ge(1)] = 1
    """Torch threads."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of images and training."""


def demo_instruct(argv: list[str]) -> None:
    config = parse_options(DemoInstructConfig, argv, "demo instruct")
    run_demo_instruct(config)


def run_demo_instruct(config: DemoInstructConfig) -> dict[str, Any]:
    """Trains twice, measures and prints; returns the figures of both runs, of fewer when a training was stopped.

    A demo that is in the folder is redone; anything else there is left alone, unless the config says to overwrite it.
    """
    import torch

    torch.set_num_threads(config.threads)
    from ...training.embedded.demo_instruct import (
        QUESTION,
        RUNS,
        evaluate_demo,
        is_demo_data,
        train_demo,
        write_demo_data,
    )

    start = time.time()
    overwrite = config.overwrite or is_demo_data(config.out / "data")
    check_folder(config.out, overwrite=overwrite)
    if overwrite and not config.overwrite:
        print(f"{config.out} holds a demo already, which this one replaces.")
    files = write_demo_data(config.out / "data", seed=config.seed)
    settings = {"adapter": config.adapter, "threads": config.threads, "seed": config.seed}
    print(f"Teaching the embedded model to answer '{QUESTION}' from 400 images ({files['train']})")
    found: dict[str, Any] = {}
    for name, steps in zip(RUNS, (config.steps, config.steps * 4 // 3), strict=True):
        run = train_demo(
            files, config.out / name, replay=name == "replay", steps=steps, overwrite=overwrite, **settings
        )
        if run.status()["state"] != "done":
            print_outcome(run.folder)
            return found
        found[name] = evaluate_demo(run, files)
    print_answers(config.out / "replay" / "answers.jsonl")
    print_figures(found)
    print(f"\neverything in {time.time() - start:.0f} s; all figures: {config.out / 'replay' / 'report.txt'}")
    print(
        f'Next: rankfold chat --run {config.out / "replay"} --image {files["train"].parent}/pictures/1-00000.png --compare "{QUESTION}"'
    )
    print("      rankfold train instruct --base llava-hf/llava-1.5-7b-hf --data YOUR.json --images FOLDER")
    return found


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Checks data and both runs of a demo that is to be made, before anything is written.

    Raises:
        UserError: for runs that are there and shall not be overwritten, and for data that no demo has written.
    """
    from ...training.config.instruct import InstructConfig
    from ...training.embedded.demo_instruct import RUNS, is_demo_data
    from ...training.runs.begin import check_out

    data = folder / "data"
    if data.exists() and any(data.iterdir()) and not is_demo_data(data):
        raise UserError(f"{data} holds files that no demo has written: give another --out.")
    for name in RUNS:
        run = Run(folder / name)
        check_out(InstructConfig(out=run.folder), overwrite=overwrite and run.is_run())


def print_answers(file: Path, count: int = 6) -> None:
    """The first answers before and after."""
    print(f"\n{'picture':>12}  {'right':6} {'before':32} after")
    for line in read_lines(file)[:count]:
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
        ("  with another row's image", lambda f: f["controls"]["another row's image"]),
        ("  with a blank image", lambda f: f["controls"]["blank image"]),
        ("old questions, before", lambda f: f["retention"]["base"]),
        ("old questions, after", lambda f: f["retention"]["tuned"]),
    ):
        print(f"{words:34} {shown(pick(alone)):28} {shown(pick(replay))}")
    for split, own in replay["retention"]["splits"].items():
        print(
            f"  {split:32} {alone['retention']['splits'][split]['tuned']:5.1%} {'':22} {own['tuned']:5.1%}   (before {own['base']:.1%})"
        )
    print(f"verdict on the new task: {replay['compared']['verdict']} (McNemar p {replay['compared']['mcnemar_p']:.1g})")
