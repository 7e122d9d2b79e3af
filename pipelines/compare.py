"""Images side by side: a grid of recipes that differ along two axes, drawn, measured and put on one sheet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..toolkit.core.errors import UserError, did_you_mean
from ..toolkit.core.files import write_png
from ..toolkit.data.images import load_rgb
from ..toolkit.formats.locate import adapter_facts, adapter_path
from ..toolkit.metrics.clip import ClipScorer, clip_i, clip_t, leave_one_out_similarity
from .generate import Recipe, generate, save_image
from .grids import add_heading, draw_grid


@dataclass(frozen=True)
class Axis:
    """What varies along one side of the sheet, from cell to cell."""

    what: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """A comparison that has been read and checked."""

    columns: Axis
    rows: Axis
    recipes: tuple[Recipe, ...]
    """Of every cell, row by row."""
    heading: str = ""
    """What all cells have."""
    tokens: tuple[str, ...] = ()
    """Rare words of the adapters: no model of texts knows them."""
    clip: str = ""
    """Name of the open_clip model; '' measures nothing."""
    photos: tuple[Path, ...] = ()

    @property
    def names(self) -> list[tuple[str, str]]:
        """Labels of column and row of every cell, row by row."""
        return [(column, row) for row in self.rows.labels for column in self.columns.labels]

    @property
    def captions(self) -> list[str]:
        """What every cell is called."""
        return [f"{column}, {row}" if row else column for column, row in self.names]


def comparison(
    base: Recipe, columns: Axis, rows: Axis | None = None, *, clip: str = "", photos: Sequence[Path] = ()
) -> Comparison:
    """A comparison of images that differ from a recipe along two axes, whose `what` are fields of it.

    clip: name of an open_clip model that measures them (metrics/clip.py); photos: of the subject, for likeness.

    Raises:
        UserError: for an axis that is no field of a recipe.
    """
    known = [field.name for field in fields(Recipe)]
    for axis in (columns, rows):
        if axis is not None and axis.what not in known:
            raise UserError(f"{axis.what} is no field of a recipe.{did_you_mean(axis.what, known)}")
    recipes = [replace(base, **{columns.what: value}) for value in columns.values]
    if rows is None:
        rows = Axis("", ("",), (None,))
    else:
        recipes = [replace(recipe, **{rows.what: value}) for value in rows.values for recipe in recipes]
    used = dict.fromkeys(path for recipe in recipes for path in recipe.adapters)
    tokens = [token for path in used for token in adapter_facts(adapter_path(Path(path))).tokens]
    return Comparison(columns, rows, tuple(recipes), base.prompt, tuple(tokens), clip, tuple(photos))


@dataclass(frozen=True)
class CellScores:
    """What was measured on a cell."""

    fidelity: float
    likeness: float | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison that has been drawn."""

    grid: str
    files: list[str]
    """Of every cell, row by row."""
    scores: list[CellScores]
    """Of every cell, [] where nothing was measured."""
    real: float | None = None
    """Likeness of a photo to the others."""


def drawing_order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Each recipe once, those of one pipeline one after another: each pipeline is loaded once."""
    groups: dict[Any, dict[Recipe, None]] = {}
    for recipe in recipes:
        groups.setdefault((recipe.base, recipe.adapters, recipe.strengths), {})[recipe] = None
    return [recipe for group in groups.values() for recipe in group]


def compare(plan: Comparison, draw: Callable[[Recipe], Path]) -> ComparisonResult:
    """Draws and measures all cells and puts the sheet beside the first.

    draw: makes the image of a recipe and says in which file it is. It is asked once for each recipe, those of one pipeline one after
    another.
    """
    scorer = ClipScorer(plan.clip) if plan.clip else None  # before the images: a wrong name should not cost them
    drawn = {recipe: draw(recipe) for recipe in drawing_order(plan.recipes)}
    files = [drawn[recipe] for recipe in plan.recipes]
    images = [load_rgb(file) for file in files]
    path = files[0].with_name(f"{files[0].stem}-sheet.png")
    write_png(path, add_heading(draw_grid(images, plan.columns.labels, plan.rows.labels), plan.heading))
    figures, real = measure_cells(scorer, plan, images) if scorer else ([], None)
    return ComparisonResult(str(path), [str(file) for file in files], figures, real)


def draw_into(folder: Path) -> Callable[[Recipe], Path]:
    """For `compare`: draws each image into a numbered file of a folder."""

    def draw(recipe: Recipe) -> Path:
        [(image, exact)] = generate(recipe, 1)
        path = folder / f"{len(list(folder.glob('*.png'))):06d}.png"
        save_image(path, image, exact)
        return path

    return draw


def measure_cells(
    scorer: ClipScorer, plan: Comparison, images: Sequence[Image.Image]
) -> tuple[list[CellScores], float | None]:
    """The figures of every cell, and how like a photo is to the other photos."""
    texts = scorer.embed_texts([remove_tokens(recipe.prompt, plan.tokens) for recipe in plan.recipes])
    photos = scorer.embed_images([load_rgb(path) for path in plan.photos]) if plan.photos else None
    real = float(leave_one_out_similarity(photos).mean()) if photos is not None and len(photos) > 1 else None
    return score_images(scorer.embed_images(images), texts, photos), real


def score_images(
    images_ND: torch.Tensor, texts_ND: torch.Tensor, photos_MD: torch.Tensor | None = None
) -> list[CellScores]:
    """Figures of images, their prompts and the photos, all as unit embeddings."""
    fidelity = clip_t(images_ND, texts_ND).tolist()
    if photos_MD is None:
        return [CellScores(one) for one in fidelity]
    likeness = clip_i(images_ND, photos_MD).tolist()
    return [CellScores(*both) for both in zip(fidelity, likeness, strict=True)]


def remove_tokens(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt without rare words; as it is when nothing would be left."""
    if not tokens:
        return prompt
    left = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, tokens))})(?!\w)", " ", prompt)
    return " ".join(left.split()) or prompt
