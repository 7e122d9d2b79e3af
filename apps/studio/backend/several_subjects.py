"""Several adapters in one image, each with a figure of its own: side by side, or where a place is painted for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....pipelines.generate import Recipe, check_recipe
from ....pipelines.subjects import check_words, own_prompts
from ....toolkit.core.errors import UserError
from ....toolkit.formats.locate import adapter_facts, adapter_path

TOGETHER, SIDE_BY_SIDE, PAINTED = "In one figure", "Side by side", "Where I paint"
ARRANGEMENTS = (TOGETHER, SIDE_BY_SIDE, PAINTED)
COLOURS = {"red": (220, 38, 38), "blue": (37, 99, 235), "green": (22, 163, 74), "yellow": (234, 179, 8)}
"""Of the places, in the order of the adapters."""
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the image


def painted_boxes(painting: dict[str, Any] | None) -> dict[str, Box]:
    """The box around what is painted in each colour that is there.

    Raises:
        UserError: for a painting that did not arrive.
    """
    if not painting or painting["background"] is None:
        raise UserError("The painted places did not arrive: press the button again.")
    boxes: dict[str, Box] = {}
    for layer in painting["layers"]:
        rgba_HW4 = np.asarray(layer, float)
        distance_CHW = np.square(rgba_HW4[..., :3] - np.array([*COLOURS.values()])[:, None, None]).sum(-1)
        nearest_HW, is_painted_HW = distance_CHW.argmin(0), rgba_HW4[..., 3] > 127
        height, width = nearest_HW.shape
        for number, name in enumerate(COLOURS):
            down, across = ((nearest_HW == number) & is_painted_HW).nonzero()
            if len(down):
                left, right, top, bottom = across.min(), across.max() + 1, down.min(), down.max() + 1
                boxes[name] = (float(left) / width, float(top) / height, float(right) / width, float(bottom) / height)
    return boxes


def trigger_words(adapter: Path | str) -> str:
    """What an adapter was taught to draw by; '' where it does not say."""
    return adapter_facts(adapter_path(Path(adapter))).trigger_words


def subject_words(adapters: Sequence[str]) -> list[str]:
    """The trigger words of each adapter.

    Raises:
        UserError: where one does not say them, or two cannot be told apart.
    """
    words = [trigger_words(path) for path in adapters]
    for number, own in enumerate(words, 1):
        if not own:
            raise UserError(
                f"Adapter {number} does not say its trigger words, by which a figure of its own is asked for: "
                "rankfold sample --subjects takes them from you."
            )
    check_words(words)
    return words


def arrange(recipe: Recipe, arrangement: str, painting: dict[str, Any] | None) -> Recipe:
    """The recipe with a figure for each adapter, where that is asked for.

    Raises:
        UserError: for fewer than two adapters, a prompt that does not say where the subjects stand in it, and places that are not one
            for each adapter.
    """
    if arrangement not in ARRANGEMENTS:
        raise UserError(f"{str(arrangement)[:60]!r} is not an arrangement: choose one of {', '.join(ARRANGEMENTS)}.")
    if arrangement == TOGETHER:
        return recipe
    if len(recipe.adapters) < 2:
        raise UserError(f"“{arrangement}” is for two adapters or more: add another one.")
    words = subject_words(recipe.adapters)
    if arrangement == SIDE_BY_SIDE:
        arranged = replace(recipe, subjects=tuple(words))
    else:
        boxes = place_boxes(painting, len(words))
        prompts = own_prompts(recipe.prompt, words)
        arranged = replace(recipe, prompt="", regions=tuple(zip(prompts, *zip(*boxes, strict=True), strict=True)))
    check_recipe(arranged)
    return arranged


def place_boxes(painting: dict[str, Any] | None, adapters: int) -> list[Box]:
    """A box for each adapter.

    Raises:
        UserError: for a colour without an adapter, or the other way round.
    """
    if adapters > len(COLOURS):
        raise UserError(f"Places can be painted for {len(COLOURS)} adapters at most, and there are {adapters}.")
    boxes, wanted = painted_boxes(painting), [*COLOURS][:adapters]
    for number, name in enumerate(wanted, 1):
        if name not in boxes:
            raise UserError(f"Adapter {number} has no place: paint one in {name}.")
    for name in boxes:
        if name not in wanted:
            raise UserError(f"There is a place in {name}, and no adapter for it: wipe it out, or add an adapter.")
    return [boxes[name] for name in wanted]


def blank_canvas() -> Image.Image:
    """The image, to paint places on."""
    return Image.new("RGB", (384, 384), (236, 239, 245))
