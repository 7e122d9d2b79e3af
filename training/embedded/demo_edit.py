"""The demo of references: the embedded model learns an edit that it cannot do, and shows that it reads it off the reference.

A soft image becomes a sharp one. The words say "a thing" or "a creature" and the scene, so which one it is can only come from the
reference: with another row's it must be another's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ...pipelines.generate import Recipe, generate, image_grid, sampling_pipeline
from ...toolkit.core.files import write_png, write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.embedded import edits, world
from ...toolkit.metrics.clip import load_embedded_judge
from ...toolkit.metrics.statistics import cluster_interval, mean_with_interval
from ..config.subject import SubjectConfig

TRAIN, TEST = 0, 1  # streams of images
IMAGE = re.compile(r"\d{4,}\.(png|txt)|\..*\.tmp")
FOLDERS = ("targets", "references", "test")
SETTINGS: dict[str, Any] = {
    "base": "tiny-kontext",
    "class_noun": "image",
    "preservation_weight": 0.0,
    "batch_size": 8,
    "rank": 16,
    "alpha": 16.0,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "target_modules": (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
        "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out", "x_embedder", "context_embedder",
    ),
    "preview_every": 0,
    "checkpoint_every": 1000,
}  # fmt: skip
SAMPLING_STEPS = 10
PSNR = "PSNR, dB"
BLUR = 1.2  # of references, pixels


@dataclass(frozen=True)
class EditRow:
    """One edit: what the reference shows, and what shall be made of it."""

    number: int
    thing: world.Thing
    reference: Image.Image
    target: Image.Image

    @property
    def prompt(self) -> str:
        return f"a {'thing' if self.thing.creature is None else 'creature'} {world.SCENES[self.thing.scene]}"


def edit_row(seed: int, stream: int, number: int) -> EditRow:
    """Row number `number`: things and creatures in turn; for the test, creatures and combinations that no training has drawn."""
    rng = np.random.default_rng((seed, 43, stream, number))
    creature = int(rng.integers(world.TRAINING_CREATURES)) + (world.TRAINING_CREATURES if stream == TEST else 0)
    thing = edits.random_figure(rng, creature if number % 2 else None, held=stream == TEST)
    target = world.draw(thing, rng)
    return EditRow(number, thing, target.filter(ImageFilter.GaussianBlur(BLUR)), target)


def write_edit_data(folder: Path, *, seed: int, rows: int, test: int) -> list[EditRow]:
    """Draws the pairs to learn from (targets with captions, and references) and the references to test with; returns the test's rows."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)  # of a demo that had more of them
        (folder / name).mkdir(parents=True)
    for number in range(rows):
        row = edit_row(seed, TRAIN, number)
        write_png(folder / "targets" / f"{number:04d}.png", row.target)
        write_png(folder / "references" / f"{number:04d}.png", row.reference)
        write_text(folder / "targets" / f"{number:04d}.txt", row.prompt)
    found = [edit_row(seed, TEST, number) for number in range(test)]
    for row in found:
        write_png(folder / "test" / f"{row.number:04d}.png", row.reference)
    return found


def is_edit_data(folder: Path) -> bool:
    """Whether `write_edit_data` has written a folder, or was killed while it did."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    files = [path for name in FOLDERS if (folder / name).is_dir() for path in (folder / name).iterdir()]
    return {path.name for path in folder.iterdir()} <= set(FOLDERS) and all(
        IMAGE.fullmatch(path.name) for path in files
    )


def edit_config(data: Path, out: Path, **settings: Any) -> SubjectConfig:
    """The training of the demo."""
    return SubjectConfig(images=data / "targets", references=(data / "references",), out=out, **(SETTINGS | settings))


def measure_edits(run: Run, data: Path, rows: Sequence[EditRow], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What the references themselves, the base, the adapter, and the adapter with another row's reference are worth as edits.

    Writes figures.json and edits.png into the run.
    """
    paths = [data / "test" / f"{row.number:04d}.png" for row in rows]
    others = [paths[(at + 2) % len(paths)] for at in range(len(paths))]  # of the same kind
    recipe = Recipe(prompt="", base=SETTINGS["base"], steps=SAMPLING_STEPS, guidance_scale=1.0)
    tuned = replace(recipe, adapters=(str(run.adapter),), strengths=(1.0,))
    made = {"the reference itself": [row.reference for row in rows]}
    for names, own, used in (
        ("before", recipe, paths),
        ("after", tuned, paths),
        ("after, another's reference", tuned, others),
    ):
        pipe = sampling_pipeline(own)
        made[names] = [
            generate(replace(own, prompt=row.prompt, seed=seed + row.number, references=(str(path),)), pipe=pipe)[0][0]
            for row, path in zip(rows, used, strict=True)
        ]
    made["the true images"] = [row.target for row in rows]
    figures = {name: edit_metrics(images, rows) for name, images in made.items()}
    del figures["the true images"][PSNR]  # they are equal
    write_text(run.folder / "figures.json", json.dumps(figures, indent=1))
    shown = [image for images in made.values() for image in images[:8]]
    sheet = image_grid(shown, columns=8)
    write_png(run.folder / "edits.png", sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST))
    return figures


def edit_metrics(images: Sequence[Image.Image], rows: Sequence[EditRow]) -> dict[str, Any]:
    """Shares with intervals: what the judge reads off the images, against what should be there (shape and colour of things alone), and
    images that are nearer to their own target than to that of any other row; and how near to it they are.
    """
    answers, found = load_embedded_judge().classify(list(images)), {}
    for question in ("scene", "shape", "colour"):
        asked = [at for at, row in enumerate(rows) if question == "scene" or row.thing.creature is None]
        found[question] = [answers[at][question] == getattr(rows[at].thing, question) for at in asked]
    pixels, targets = (
        np.stack([np.asarray(one, np.float32) for one in some]) for some in (images, [r.target for r in rows])
    )
    distance = np.abs(pixels[:, None] - targets[None]).mean((2, 3, 4))
    noise = -10 * np.log10(np.square((pixels - targets) / 255).mean((1, 2, 3)).clip(1e-12))
    found["own target nearest"] = (distance.argmin(1) == np.arange(len(rows))).tolist()
    names = [str(row.number) for row in rows]
    low, high = cluster_interval(noise.tolist(), names)
    shares = {name: mean_with_interval([float(one) for one in own], names[: len(own)]) for name, own in found.items()}
    return shares | {PSNR: {"mean": float(noise.mean()), "low": low, "high": high}}
