"""What the boxes of a page mean as a recipe, and what an adapter asks of the boxes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ....pipelines.generate import Recipe, precision_of
from ....toolkit.core.errors import UserError
from ....toolkit.formats.source import adapter_path, facts_of
from .paths import Places


def adapters_from(places: Places, rows: tuple[Any, ...]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Paths and strengths of the rows that are on. rows: on, name and strength, row by row."""
    chosen = [rows[at : at + 3] for at in range(0, len(rows), 3)]
    found = [(str(places.adapter(name)), float(strength)) for on, name, strength in chosen if on and name]
    return tuple(path for path, _ in found), tuple(strength for _, strength in found)


def recipe_from(
    places: Places, base: str, prompt: str, negative: str, values: dict[str, Any], rows: tuple[Any, ...]
) -> Recipe:
    """The recipe that the boxes mean.

    Raises:
        UserError: for an empty prompt, or a number out of range.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty: say what the picture should show.")
    paths, strengths = adapters_from(places, rows)
    return Recipe(
        prompt=prompt,
        base=places.base(base),
        negative_prompt=negative,
        adapters=paths,
        strengths=strengths,
        steps=int(values["steps"]),
        guidance_scale=float(values["guidance_scale"]),
        side=int(values["width"]),
        height=int(values["height"]),
        seed=int(values["seed"]),
        precision=precision_of(paths),
    )


def suited(places: Places, name: str) -> tuple[Any, Any]:
    """Base and prompt that an adapter was made for."""
    if not name:
        return gr.skip(), gr.skip()
    facts = facts_of(adapter_path(places.adapter(name)))
    words = f"{facts.get('token', '')} {facts.get('class_noun', '')}".strip()
    return facts.get("base") or gr.skip(), f"a {words} on the beach" if words else gr.skip()
