"""The demos of visual instruction tuning: tasks that the embedded model cannot do, learned and measured.

sort    things go into two boxes by their colour, warm ones into box one, cold ones into box two: a rule that the base never saw.
        Learned twice, without and with a quarter of old questions, since alone it makes the base forget some of what it could do.
where   the box of a thing that is named, in an image with another beside it: the base knows places by words, and no box.
moves   which way a creature goes in four frames, or whether it grows or shrinks; the base has never seen two images at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.embedded import groups, moves, questions, world
from ...toolkit.embedded.world import Thing
from ...toolkit.vlm.model import resolve_vision_base
from ..config.instruct import InstructConfig
from ..evaluation.instruct import evaluate
from ..evaluation.instruct_report import format_report, write_figures
from ..evaluation.items import read_items
from ..launch.start import train

QUESTION = "Which box does it go into?"
WHERE = "Where is the"
MOVES = "Where does it go, or does it become large or small?"
BOXES = {"one": ("red", "orange", "yellow"), "two": ("green", "blue", "purple")}
IMAGE = re.compile(r"\d-\d{5}(\.png)?|\..*\.tmp")
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
# The head is among the layers: the base never learned to say a digit, and its vectors of tokens that were never said are alike.
WHERE_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("rank", 16),
    ("alpha", 16.0),
    ("learning_rate", 3e-3),
    ("lr_warmup_steps", 20),
    ("target_modules", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")),
    ("target_parts", ()),
    ("train_projector", True),
    ("projector_learning_rate", 1e-3),
)
MOVES_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("rank", 16),
    ("alpha", 16.0),
    ("learning_rate", 3e-3),
    ("lr_warmup_steps", 20),
    ("train_projector", True),
    ("projector_learning_rate", 1e-3),
)


@dataclass(frozen=True)
class DemoTask:
    """What the embedded model learns in a demo."""

    question: str
    """What is asked, or how it begins."""
    make_row: Callable[[Path, int, int, int], dict[str, Any]]
    """(folder, seed, stream, number) -> a row, whose image it writes."""
    rows: int
    """Images to learn from."""
    steps: int
    runs: tuple[str, ...] = RUNS
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings of its own."""
    video: bool = False
    """Whether its rows are videos, which the embedded model takes in another class; old questions are not asked then."""


def write_demo_data(
    folder: Path, *, task: str = "sort", seed: int = 0, rows: int | None = None, test: int = 200, old: int = 200
) -> dict[str, Path]:
    """Draws the images of a task and writes train.json, test.json, replay.json and retention.json."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    chosen = TASKS[task]
    rows = chosen.rows if rows is None else rows
    made = {
        "train": [chosen.make_row(folder, seed, TRAIN, number) for number in range(rows)],
        "test": [chosen.make_row(folder, seed, TEST, number) for number in range(test)],
        "replay": [
            llava_row(old_row(folder, seed, REPLAY, number)) for number in range(rows if "replay" in chosen.runs else 0)
        ],
        "retention": [old_row(folder, seed, RETENTION, number) for number in range(0 if chosen.video else old)],
    }
    for name, content in made.items():
        write_text(folder / f"{name}.json", json.dumps(content, indent=1))
    files = {name: folder / f"{name}.json" for name in made}
    if chosen.video:
        from ...toolkit.embedded.tiny_vlm import save_video_model

        files["base"] = folder / "base"
        save_video_model(Path(resolve_vision_base("tiny-vlm")), files["base"])
    return files


def is_demo_data(folder: Path) -> bool:
    """Whether `write_demo_data` has written a folder, or was killed while it did."""
    try:
        names = {path.name for path in folder.iterdir()}
        if "train.json" in names:
            first = json.loads((folder / "train.json").read_text(encoding="utf-8"))[0]
            asked = first["question"] if "question" in first else first["conversations"][0]["value"]
            return any(task.question in asked for task in TASKS.values())
        return "pictures" in names <= {"pictures", "base"} and all(
            IMAGE.fullmatch(path.name) for path in (folder / "pictures").iterdir()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def sort_row(folder: Path, seed: int, stream: int, number: int) -> dict[str, Any]:
    """An image of one thing, and the box that it goes into; what is learned from in LLaVA's format."""
    rng = np.random.default_rng((seed, 23, stream, number))
    box = sorted(BOXES)[number % 2]
    thing = world.random_thing(rng)
    while thing.count != "one" or thing.colour not in BOXES[box]:
        thing = world.random_thing(rng)
    row = {"image": write_thing(folder, thing, rng, stream, number), "question": QUESTION, "answer": box}
    return llava_row(row) if stream == TRAIN else row


def where_row(folder: Path, seed: int, stream: int, number: int) -> dict[str, Any]:
    """An image, of one thing and of several in turn, and where each is; of what is measured by, where one of them is."""
    rng = np.random.default_rng((seed, 31, stream, number))
    if number % 2:
        group = groups.random_group(rng)
        while len(set(group.things.values())) < len(group.things):  # each is named by colour and shape
            group = groups.random_group(rng)
        image, corners = groups.draw_group_with_boxes(group, rng)
        places = [(group.things[corner], box) for corner, box in corners.items()]
    else:
        thing = world.random_thing(rng, held=stream != TRAIN)
        while thing.count != "one":
            thing = world.random_thing(rng, held=stream != TRAIN)
        image, boxes = world.draw_with_boxes(thing, rng)
        places = [((thing.shape, str(thing.colour)), boxes[0])]
    name = f"pictures/{stream}-{number:05d}.png"
    write_png(folder / name, image)
    asked = [places[at] for at in rng.permutation(len(places))][: None if stream == TRAIN else 1]
    turns = []
    for at, ((shape, colour), _) in enumerate(asked):
        words = f"{WHERE} {colour} {shape}?"
        turns += [{"from": "human", "value": words if at else f"<image>\n{words}"}, {"from": "gpt", "value": "<bbox>"}]
    return {"image": name, "conversations": turns, "objects": {"bbox": [list(box) for _, box in asked]}}


def moves_row(folder: Path, seed: int, stream: int, number: int) -> dict[str, Any]:
    """A film of a creature, one that the base has not seen where it is measured by, and what it does."""
    rng = np.random.default_rng((seed, 37, stream, number))
    way = list(moves.WAYS)[number % len(moves.WAYS)]
    known = world.TRAINING_CREATURES
    creature = int(rng.integers(known)) + (0 if stream == TRAIN else known)
    name = f"pictures/{stream}-{number:05d}"
    (folder / name).mkdir(exist_ok=True)
    for at, frame in enumerate(moves.draw_moves(creature, str(rng.choice(list(world.SCENES))), way, rng)):
        write_png(folder / name / f"{at}.png", frame)
    return {"video": name, "fps": 2, "question": MOVES, "answer": way}


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


TASKS = {
    "sort": DemoTask(QUESTION, sort_row, rows=400, steps=150),
    "where": DemoTask(WHERE, where_row, rows=1200, steps=600, runs=("alone",), settings=WHERE_SETTINGS),
    "moves": DemoTask(MOVES, moves_row, rows=1200, steps=300, runs=("alone",), settings=MOVES_SETTINGS, video=True),
}


def train_demo(
    files: dict[str, Path], out: Path, *, task: str = "sort", replay: bool, overwrite: bool = False, **settings: Any
) -> Run:
    """Trains on a task, with or without old questions. overwrite: as in `train`, where a run is there."""
    own = SETTINGS | dict(TASKS[task].settings)
    if "base" in files:
        own["base"] = str(files["base"])
    config = InstructConfig(
        data=files["train"], replay=files["replay"] if replay else None, out=out, **(own | settings)
    )
    return train(config, overwrite=overwrite and Run(out).is_run())


def evaluate_demo(run: Run, files: dict[str, Path]) -> dict[str, Any]:
    """The run's figures on new and old questions; the report and every answer are written into it."""
    from ...pipelines.chat import open_chat

    vision = open_chat(str(files.get("base", "tiny-vlm")), [run.adapter])
    items = read_items(files["test"], None)
    retention = [] if "base" in files else read_items(files["retention"], None)
    figures = evaluate(vision, items, retention=retention, max_new_tokens=48, likelihood=False)
    write_text(run.folder / "report.txt", format_report(figures))
    write_figures(run.folder, figures)
    return figures
