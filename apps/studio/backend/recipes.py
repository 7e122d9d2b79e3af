"""What the boxes of a page mean as a recipe, and what an adapter asks of the boxes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ....pipelines.generate import Recipe, adapter_precision
from ....toolkit.core.errors import UserError
from ....toolkit.formats.locate import adapter_facts, adapter_path
from .paths import StudioPaths


def parse_adapter_rows(paths: StudioPaths, rows: tuple[Any, ...]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Paths and strengths of the rows that are on. rows: on, name and strength, row by row."""
    chosen = [rows[at : at + 3] for at in range(0, len(rows), 3)]
    found = [(str(paths.adapter(name)), float(strength)) for on, name, strength in chosen if on and name]
    return tuple(path for path, _ in found), tuple(strength for _, strength in found)


def build_recipe(
    paths: StudioPaths, base: str, prompt: str, negative: str, values: dict[str, Any], rows: tuple[Any, ...]
) -> Recipe:
    """The recipe that the boxes mean.

    Raises:
        UserError: for an empty prompt, or a number out of range.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty: say what the image should show.")
    adapter_paths, strengths = parse_adapter_rows(paths, rows)
    return Recipe(
        prompt=prompt,
        base=paths.base(base),
        negative_prompt=negative,
        adapters=adapter_paths,
        strengths=strengths,
        steps=int(values["steps"]),
        guidance_scale=float(values["guidance_scale"]),
        width=int(values["width"]),
        height=int(values["height"]),
        seed=int(values["seed"]),
        precision=adapter_precision(adapter_paths),
    )


def suggested_base_and_prompt(paths: StudioPaths, name: str) -> tuple[Any, Any]:
    """Base and prompt that an adapter was made for."""
    if not name:
        return gr.skip(), gr.skip()
    facts = adapter_facts(adapter_path(paths.adapter(name)))
    words = facts.trigger_words
    return facts.base or gr.skip(), f"a {words} on the beach" if words else gr.skip()
