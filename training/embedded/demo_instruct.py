"""The demo of visual instruction tuning: a task that the embedded model cannot do, learned twice, without and with replay.

The task is to sort things into two boxes by their colour, warm ones into box one, cold ones into box two: a rule that the base never saw.
What the base could do before is asked again afterwards: after training on the new task alone it has forgotten some of it, and with a
quarter of old questions mixed in it has not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.embedded import groups, questions, world
from ...toolkit.embedded.world import Thing
from ..config.instruct import InstructConfig
from ..evaluation.instruct import evaluate
from ..evaluation.instruct_report import format_report, write_figures
from ..evaluation.items import read_items
from ..launch.start import train

QUESTION = "Which box does it go into?"
BOXES = {"one": ("red", "orange", "yellow"), "two": ("green", "blue", "purple")}
IMAGE = re.compile(r"\d-\d{5}\.png|\..*\.tmp")
RUNS = ("alone", "replay")
TRAIN, TEST, REPLAY, RETENTION = 0, 1, 2, 3  # streams of images
SETTINGS: dict[str, Any] = {
    "base": "tiny-vlm",
    "batch_size": 16,
    "rank": 8,
    "alpha": 8.0,
    "learning_rate": 5e-3,
    "lr_scheduler": "cosine",
    "target_parts": ("language-attention", "language-mlp"),
    "workers": 0,
    "preview_every": 0,
    "checkpoint_every": 1000,
}


def write_demo_data(
    folder: Path, *, seed: int = 0, rows: int = 400, test: int = 200, old: int = 200
) -> dict[str, Path]:
    """Draws the images and writes train.json (LLaVA's format), test.json, replay.json and retention.json."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    made = {
        "train": [new_row(folder, seed, TRAIN, number) for number in range(rows)],
        "test": [new_row(folder, seed, TEST, number) for number in range(test)],
        "replay": [old_row(folder, seed, REPLAY, number) for number in range(rows)],
        "retention": [old_row(folder, seed, RETENTION, number) for number in range(old)],
    }
    for name in ("train", "replay"):
        made[name] = [llava_row(row) for row in made[name]]
    for name, content in made.items():
        write_text(folder / f"{name}.json", json.dumps(content, indent=1))
    return {name: folder / f"{name}.json" for name in made}


def is_demo_data(folder: Path) -> bool:
    """Whether `write_demo_data` has written a folder, or was killed while it did."""
    try:
        names = {path.name for path in folder.iterdir()}
        if "train.json" in names:
            return (
                QUESTION
                in json.loads((folder / "train.json").read_text(encoding="utf-8"))[0]["conversations"][0]["value"]
            )
        return names == {"pictures"} and all(IMAGE.fullmatch(path.name) for path in (folder / "pictures").iterdir())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def new_row(folder: Path, seed: int, stream: int, number: int) -> dict[str, str]:
    """An image of one thing, and its box."""
    rng = np.random.default_rng((seed, 23, stream, number))
    box = sorted(BOXES)[number % 2]
    thing = world.random_thing(rng)
    while thing.count != "one" or thing.colour not in BOXES[box]:
        thing = world.random_thing(rng)
    return {"image": write_thing(folder, thing, rng, stream, number), "question": QUESTION, "answer": box}


def old_row(folder: Path, seed: int, stream: int, number: int) -> dict[str, str]:
    """An image and one of the questions that the base can answer, each kind in turn."""
    rng = np.random.default_rng((seed, 29, stream, number))
    if number % 2:
        group = groups.random_group(rng)
        name = f"{stream}-{number:05d}.png"
        write_png(folder / "pictures" / name, groups.draw_group(group, rng))
        asked = questions.group_questions(group, rng)
    else:
        thing = world.random_thing(rng)
        name = write_thing(folder, thing, rng, stream, number).removeprefix("pictures/")
        asked = questions.thing_questions(thing)
    kinds = sorted({kind for kind, *_ in asked})
    kind = kinds[(number // 2) % len(kinds)]
    _, question, answer = next(one for one in asked if one[0] == kind)
    return {"image": f"pictures/{name}", "question": question, "answer": answer, "split": kind, "type": "vqa"}


def write_thing(folder: Path, thing: Thing, rng: np.random.Generator, stream: int, number: int) -> str:
    """Writes an image of a thing; returns its path from the folder."""
    name = f"pictures/{stream}-{number:05d}.png"
    write_png(folder / name, world.draw(thing, rng))
    return name


def llava_row(row: dict[str, str]) -> dict[str, Any]:
    """The same row in LLaVA's format."""
    turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
    return {"image": row["image"], "conversations": turns}


def train_demo(files: dict[str, Path], out: Path, *, replay: bool, overwrite: bool = False, **settings: Any) -> Run:
    """Trains on the new task, with or without old questions. overwrite: as in `train`, where a run is there."""
    config = InstructConfig(
        data=files["train"], replay=files["replay"] if replay else None, out=out, **(SETTINGS | settings)
    )
    return train(config, overwrite=overwrite and Run(out).is_run())


def evaluate_demo(run: Run, files: dict[str, Path]) -> dict[str, Any]:
    """The run's figures on new and old questions; the report and every answer are written into it."""
    from ...pipelines.chat import open_chat

    vision = open_chat("tiny-vlm", [run.adapter])
    items, retention = (read_items(files[name], None) for name in ("test", "retention"))
    figures = evaluate(vision, items, retention=retention, max_new_tokens=48, likelihood=False)
    write_text(run.folder / "report.txt", format_report(figures))
    write_figures(run.folder, figures)
    return figures
