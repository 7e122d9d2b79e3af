"""`rankfold demo instruct`: a vision-language model learns a task, offline, and shows what it saw, learned and forgot."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.core.texts import read_lines
from .options import OverwriteOption, parse_options
from .outcome import print_outcome


@dataclass(frozen=True, kw_only=True)
class DemoInstructConfig(OverwriteOption):
    """Teaches the embedded vision-language model a task that it cannot do."""

    task: Literal["sort", "where", "moves"] = "sort"
    """What is learned: into which box a thing goes, where in the image it is, or which way it goes in a video."""
    out: Path = Path("runs/demo-instruct")
    """Folder of data, runs and answers."""
    steps: Annotated[int, Ge(1)] | None = None
    """Training steps of the new task alone; with replay a third more; unset means the task's own."""
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
        TASKS,
        evaluate_demo,
        is_demo_data,
        train_demo,
        write_demo_data,
    )

    start, task = time.time(), TASKS[config.task]
    overwrite = config.overwrite or is_demo_data(config.out / "data")
    check_folder(config.out, overwrite=overwrite)
    if overwrite and not config.overwrite:
        print(f"{config.out} holds a demo already, which this one replaces.")
    files = write_demo_data(config.out / "data", task=config.task, seed=config.seed)
    settings = {"adapter": config.adapter, "threads": config.threads, "seed": config.seed}
    said = task.question if task.question.endswith("?") else f"{task.question} ...?"
    kind = "videos" if task.video else "images"
    print(f"Teaching the embedded model to answer '{said}' from {task.rows} {kind} ({files['train']})")
    found: dict[str, Any] = {}
    for name in task.runs:
        steps = task.steps if config.steps is None else config.steps
        run = train_demo(
            files,
            config.out / name,
            task=config.task,
            replay=name == "replay",
            steps=steps * 4 // 3 if name == "replay" else steps,
            overwrite=overwrite,
            **settings,
        )
        if run.status()["state"] != "done":
            print_outcome(run.folder)
            return found
        found[name] = evaluate_demo(run, files)
    shown = config.out / task.runs[-1]
    print_answers(shown / "answers.jsonl")
    print_figures(found)
    print(f"\neverything in {time.time() - start:.0f} s; all figures: {shown / 'report.txt'}")
    seen, asked = files["test"].parent / "pictures" / "1-00000", first_question(files["test"])
    shown_to = f"--video {seen}" if task.video else f"--image {seen}.png"
    print(f'Next: rankfold chat --run {shown} {shown_to} --compare "{asked}"')
    print("      rankfold train instruct --base llava-hf/llava-1.5-7b-hf --data YOUR.json --images FOLDER")
    return found


def first_question(file: Path) -> str:
    """The first question of a file that the demo wrote."""
    row = json.loads(file.read_text(encoding="utf-8"))[0]
    return row["question"] if "question" in row else row["conversations"][0]["value"].removeprefix("<image>\n")


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


OTHER, REORDERED = "another row's image", "frames in another order"
COLUMNS = {"alone": "new task alone", "replay": "with a quarter of old questions"}


def print_figures(found: dict[str, Any]) -> None:
    """What was learned, seen, forgotten and kept, a column for each run."""
    shown = lambda own: f"{own['mean']:5.1%} ({own['low']:.1%} to {own['high']:.1%})"  # noqa: E731
    print(f"\n{'':34} {' '.join(f'{COLUMNS[name]:28}' for name in found)}".rstrip())
    last = next(reversed(found.values()))
    lines = [
        ("new task, before", lambda f: shown(f["base"]["accuracy"])),
        ("new task, after", lambda f: shown(f["tuned"]["accuracy"])),
        ("  with another row's image", lambda f: shown(f["controls"][OTHER])),
        ("  with a blank image", lambda f: shown(f["controls"]["blank image"])),
        ("  one answer to all", lambda f: f"{f['controls']['commonest answer']['mean']:5.1%}"),
    ]
    if REORDERED in last["controls"]:
        lines.insert(2, ("  with its frames in another order", lambda f: shown(f["controls"][REORDERED])))
    if "retention" in last:
        lines.append(("old questions, before", lambda f: shown(f["retention"]["base"])))
        lines.append(("old questions, after", lambda f: shown(f["retention"]["tuned"])))
    if "iou" in last["tuned"]:
        lines[2:2] = [
            ("mean IoU of boxes, before", lambda f: f"{f['base']['iou']['mean']:.3f}"),
            ("mean IoU of boxes, after", lambda f: f"{f['tuned']['iou']['mean']:.3f}"),
            ("  with another row's image", lambda f: f"{f['controls'][OTHER]['iou']:.3f}"),
            ("  one box for all", lambda f: f"{f['controls']['commonest answer']['iou']:.3f}"),
        ]
    for words, pick in lines:
        print(f"{words:34} {' '.join(f'{pick(figures):28}' for figures in found.values())}".rstrip())
    for split, own in last.get("retention", {"splits": {}})["splits"].items():
        after = [f"{figures['retention']['splits'][split]['tuned']:<28.1%}" for figures in found.values()]
        print(f"  {split:32} {' '.join(after).rstrip()}   (before {own['base']:.1%})")
    verdict = last["compared"]
    print(f"verdict on the new task: {verdict['verdict']} (McNemar p {verdict['mcnemar_p']:.1g})")
