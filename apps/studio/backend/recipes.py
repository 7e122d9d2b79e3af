"""What the boxes of a page mean as a recipe, and what an adapter asks of the boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.generate import Recipe, adapter_precision
from ....toolkit.core.errors import UserError
from ....toolkit.formats.locate import adapter_facts, adapter_path, content_hash
from ....training.config.defaults import drawing_defaults
from ....training.config.images import DiffusionConfig
from ....training.config.yaml_file import from_yaml
from .numbers import parse_number, parse_seed
from .paths import StudioPaths

MAX_PROMPT = 20_000  # characters
SAMPLERS = {  # of pipelines that predict noise; flow models have one sampler of their own
    "Model default": "", "DDIM": "DDIMScheduler", "DPM++ 2M": "DPMSolverMultistepScheduler", "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler", "Heun": "HeunDiscreteScheduler", "UniPC": "UniPCMultistepScheduler",
}  # fmt: skip


def parse_sampler(text: str | None) -> str:
    """The scheduler class that a sampler's name stands for; '' for the base's own.

    Raises:
        UserError: for another name.
    """
    if text is None or text in SAMPLERS.values() or re.fullmatch(r"[A-Za-z0-9]{1,60}Scheduler", text):
        return text or ""
    if text not in SAMPLERS:
        raise UserError(f"{str(text)[:60]!r} is not a sampler: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[text]


def parse_adapter_rows(paths: StudioPaths, rows: tuple[Any, ...]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Paths and strengths of the rows that are on. rows: on, name and strength, row by row."""
    chosen = [rows[at : at + 3] for at in range(0, len(rows), 3)]
    found = [
        (str(paths.adapter(name)), parse_number("strength", strength)) for on, name, strength in chosen if on and name
    ]
    return tuple(path for path, _ in found), tuple(strength for _, strength in found)


def sampler_name(scheduler: str) -> str:
    """What a page calls a scheduler class."""
    return next((name for name, own in SAMPLERS.items() if own == scheduler), scheduler)


def build_recipe(
    paths: StudioPaths, base: str, prompt: str, negative: str, values: dict[str, Any], rows: tuple[Any, ...]
) -> Recipe:
    """The recipe that the boxes mean.

    Raises:
        UserError: for an empty prompt, or a number out of range.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty: say what the image should show.")
    if len(prompt) + len(negative) > MAX_PROMPT:
        raise UserError(f"The prompts are longer than {MAX_PROMPT} characters: shorten them.")
    adapter_paths, strengths = parse_adapter_rows(paths, rows)
    base = paths.base(base)
    steps, guidance = drawing_numbers(base, adapter_paths, values["steps"], values["guidance_scale"])
    return Recipe(
        prompt=prompt,
        base=base,
        negative_prompt=negative,
        adapters=adapter_paths,
        strengths=strengths,
        steps=steps,
        guidance_scale=guidance,
        width=parse_number("width", values["width"]),
        height=parse_number("height", values["height"]),
        seed=parse_seed(values["seed"]),
        scheduler=parse_sampler(values.get("scheduler", "")),
        references=values.get("references", ()),
        image=values.get("image", ""),
        mask=values.get("mask", ""),
        image_strength=parse_number("image strength", values.get("image_strength", Recipe.image_strength)),
        precision=adapter_precision(adapter_paths),
    )


def drawing_numbers(base: str, adapters: Sequence[str], steps: Any, guidance: Any) -> tuple[int, float]:
    """Steps and guidance of two boxes; an empty one means what `rankfold sample` takes: the first adapter's run's, or the base's.

    Raises:
        UserError: for a number out of range.
    """
    own_steps, own_guidance = 0, 0.0
    steps, guidance = (None if number is None or not str(number).strip() else number for number in (steps, guidance))
    if None in (steps, guidance):
        above = [folder / "config.yaml" for folder in Path(adapters[0]).parents[:3]] if adapters else []
        config = next((from_yaml(file) for file in above if file.is_file()), None)
        own_steps, own_guidance = drawing_defaults(base, config if isinstance(config, DiffusionConfig) else None)
    return (
        own_steps if steps is None else parse_number("steps", steps),
        own_guidance if guidance is None else parse_number("guidance", guidance),
    )


def base_numbers(paths: StudioPaths, base: str) -> tuple[Any, Any]:
    """What empty boxes for steps and guidance mean with a base; as they are for one that cannot be found."""
    try:
        numbers = drawing_defaults(paths.base(base))
    except UserError:
        return gr.skip(), gr.skip()
    steps, guidance = (gr.update(placeholder=f"{number:g}") for number in numbers)
    return steps, guidance


def suggested_base_and_prompt(paths: StudioPaths, name: str) -> tuple[Any, list[str]]:
    """The base that an adapter was made for, as a page's update; and a prompt for it, in a list, or none."""
    if not name:
        return gr.skip(), []
    facts = adapter_facts(adapter_path(paths.adapter(name)))
    words = facts.trigger_words
    return facts.base or gr.skip(), [f"a {words} on the beach"] if words else []


def recalled_adapters(paths: StudioPaths, recipe: Recipe) -> list[str]:
    """What pages call the adapters that an image was made with. Nothing that it names is looked at before it is known to be ours.

    Raises:
        UserError: for one that is not here, or has changed since.
    """
    names = [paths.adapter_name(path, content) for path, content in zip(recipe.adapters, recipe.hashes, strict=True)]
    for name, content in zip(names, recipe.hashes, strict=True):
        if content_hash(adapter_path(paths.adapter(name))) != content:
            raise UserError(f"The adapter {name} has changed since this image was made, so it cannot be made again.")
    return names
