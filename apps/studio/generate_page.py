"""Generate: pictures with any base and any number of adapters, and their settings back from a picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.generate import Recipe, read_recipe, recipe_in
from ...toolkit.errors import UserError
from ...toolkit.formats.source import adapter_path, facts_of
from ...toolkit.models.diffusion import EMBEDDED
from .pipes import Drawing, Stopped, followed, kept
from .places import Places
from .studio import Studio
from .words import note, plainly, progress

ROWS = 24  # of adapters: all are there from the start, hidden until they are asked for
MOST = 64  # pictures at once


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
    )


def suited(places: Places, name: str) -> tuple[Any, Any]:
    """Base and prompt that an adapter was made for."""
    if not name:
        return gr.skip(), gr.skip()
    facts = facts_of(adapter_path(places.adapter(name)))
    words = f"{facts.get('token', '')} {facts.get('class_noun', '')}".strip()
    return facts.get("base") or gr.skip(), f"a {words} on the beach" if words else gr.skip()


class AdapterRows:
    """Rows of adapters: on or off, which, and how strong; more are shown as they are asked for."""

    def __init__(self, places: Places, label: str = "adapter") -> None:
        self.places, self.rows = places, []
        for number in range(ROWS):
            with gr.Row(visible=number == 0) as row:
                on = gr.Checkbox(label="on", value=True, scale=0, min_width=70)
                name = gr.Dropdown(
                    [], allow_custom_value=True, label=f"{label} {number + 1}", scale=3, elem_id=f"{label}-{number + 1}"
                )
                slider = gr.Slider(-1, 2, 1, step=0.05, label="strength", scale=3)
                strength = gr.Number(1, label="strength, any number", step=0.05, scale=1, min_width=120)
                slider.input(None, slider, strength, js="(value) => value", api_visibility="private", queue=False)
            self.rows.append((row, on, name, strength))
        self.more = gr.Button("One more adapter", size="sm")
        self.count = gr.State(1)
        self.more.click(
            self.grow, self.count, [self.count, *(row for row, *_ in self.rows)], api_visibility="private", queue=False
        )

    @property
    def boxes(self) -> list[Any]:
        """On, name and strength, row by row."""
        return [box for _, *own in self.rows for box in own]

    @property
    def names(self) -> list[Any]:
        """The boxes with the names."""
        return [name for _, _, name, _ in self.rows]

    def grow(self, count: int) -> list[Any]:
        """One more row."""
        count = min(ROWS, count + 1)
        return [count, *(gr.update(visible=number < count) for number in range(ROWS))]

    def choices(self) -> list[Any]:
        """The adapters as they are now, for every row."""
        names = list(self.places.adapters())
        return [gr.Dropdown(choices=["", *names]) for _ in range(ROWS)]


def build(studio: Studio) -> None:
    """The page."""
    places, pipes = studio.places, studio.pipes

    @plainly
    def make_pictures(base: str, prompt: str, negative: str, seed: float, n: float, steps: float, guidance: float,
                 width: float, height: float, *rows: Any) -> Any:  # fmt: skip
        if not 1 <= n <= MOST:
            raise UserError(f"The number of pictures must lie between 1 and {MOST}, not {n:g}.")
        values = {
            "steps": steps, "guidance_scale": guidance, "width": width, "height": height,
            "seed": random.randrange(2**31) if seed < 0 else seed,
        }  # fmt: skip
        recipe = recipe_from(places, base, prompt, negative, values, rows)
        batches = -(-int(n) // 4)
        try:
            for now in followed(lambda drawing: pipes.draw(recipe, int(n), drawing), batches * recipe.steps):
                if isinstance(now, Drawing):
                    yield progress(now.share), gr.skip(), gr.skip()
                else:
                    yield note(f"Seed {recipe.seed}."), kept(now, places.made(), "picture"), recipe.seed
        except Stopped:
            yield note("Stopped."), gr.skip(), gr.skip()

    @plainly
    def take_back(file: str | None) -> tuple[Any, ...]:
        if not file:
            raise UserError("Drop a PNG that was made here, or by rankfold sample.")
        recipe = recipe_in(Path(file))
        names = [places.adapter_called(path) for path in recipe.adapters]  # before anything that it names is read
        places.base(recipe.base)
        read_recipe(Path(file))
        if len(names) > ROWS:
            raise UserError(f"The picture has {len(names)} adapters, and this page shows {ROWS}.")
        rows: list[Any] = []
        for number in range(ROWS):
            there = number < len(names)
            rows += [there or number == 0, names[number] if there else None, recipe.strengths[number] if there else 1.0]
        values = [
            recipe.base,
            recipe.prompt,
            recipe.negative_prompt,
            recipe.seed,
            1,
            recipe.steps,
            recipe.guidance_scale,
        ]
        visible = [gr.update(visible=number < max(1, len(names))) for number in range(ROWS)]
        said = note(f"The settings of {Path(file).name}.")
        return (said, *values, recipe.side, recipe.height, *rows, max(1, len(names)), *visible)

    @plainly
    def suit(name: str) -> tuple[Any, Any]:
        return suited(places, name)

    adapters = AdapterRows(places)
    with gr.Row():
        base = gr.Dropdown([*EMBEDDED], value="tiny", allow_custom_value=True, label="Base model", elem_id="base")
        prompt = gr.Textbox(label="Prompt", value="a sks creature on the beach", lines=2, scale=2, elem_id="prompt")
        negative = gr.Textbox(label="Not in the picture (negative prompt)", lines=2, scale=1)
    with gr.Row():
        seed = gr.Number(label="Seed (-1: by chance)", value=-1, precision=0, min_width=120, elem_id="seed")
        n = gr.Number(label="Pictures", value=4, precision=0, minimum=1, maximum=MOST, min_width=120, elem_id="n")
        steps = gr.Number(label="Steps", value=25, precision=0, minimum=1, min_width=120, elem_id="steps")
        guidance = gr.Number(label="Guidance", value=2.0, min_width=120, elem_id="guidance")
        width = gr.Number(label="Width (0: the base's own)", value=0, precision=0, min_width=120)
        height = gr.Number(label="Height (0: as wide)", value=0, precision=0, min_width=120)
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", variant="stop")
    said = gr.HTML(label="Progress", elem_id="progress")
    gallery = gr.Gallery(
        label="Pictures (their settings are inside)", columns=4, height="max-content", format="png", elem_id="pictures"
    )
    with gr.Row():
        dropped = gr.File(label="A picture made here gives its settings back", file_types=[".png"], elem_id="dropped")

    boxes = [base, prompt, negative, seed, n, steps, guidance, width, height, *adapters.boxes]
    last = gr.Number(visible=False)
    event = go.click(make_pictures, boxes, [said, gallery, last], api_name="generate", concurrency_id="device")
    stop.click(None, cancels=[event])
    shown_rows = [row for row, *_ in adapters.rows]
    dropped.upload(take_back, dropped, [said, *boxes, adapters.count, *shown_rows], api_name="recall")
    adapters.names[0].input(suit, adapters.names[0], [base, prompt], api_visibility="private", queue=False)
    page = gr.context.Context.root_block
    page.load(adapters.choices, None, adapters.names, api_visibility="private", show_progress="hidden")
