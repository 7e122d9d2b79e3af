"""Generate: pictures with any base and any number of adapters, and their settings back from a picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.generate import read_recipe, recipe_in
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ..backend.context import Studio
from ..backend.pipeline_worker import Drawing, Stopped, followed, kept
from ..backend.recipes import recipe_from, suited
from ..render.messages import note, plainly, progress
from ..widgets.adapter_rows import AdapterRows, shown, values_of

MOST = 64  # pictures at once


class Generate:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.places, self.pipes = studio.places, studio.pipes

    def make_pictures(self, base: str, prompt: str, negative: str, seed: float, n: float, steps: float, guidance: float,
                      width: float, height: float, *rows: Any) -> Any:  # fmt: skip
        """Draws; yields progress, then the pictures and their seed."""
        if not 1 <= n <= MOST:
            raise UserError(f"The number of pictures must lie between 1 and {MOST}, not {n:g}.")
        values = {
            "steps": steps, "guidance_scale": guidance, "width": width, "height": height,
            "seed": random.randrange(2**31) if seed < 0 else seed,
        }  # fmt: skip
        recipe = recipe_from(self.places, base, prompt, negative, values, rows)
        batches = -(-int(n) // 4)
        try:
            for now in followed(lambda drawing: self.pipes.draw(recipe, int(n), drawing), batches * recipe.steps):
                if isinstance(now, Drawing):
                    yield progress(now.share), gr.skip(), gr.skip()
                else:
                    yield note(f"Seed {recipe.seed}."), kept(now, self.places.made(), "picture"), recipe.seed
        except Stopped:
            yield note("Stopped."), gr.skip(), gr.skip()

    def take_back(self, file: str | None) -> tuple[Any, ...]:
        """The settings of a picture, for every box, and for how many rows are shown."""
        if not file:
            raise UserError("Drop a PNG that was made here, or by rankfold sample.")
        recipe = recipe_in(Path(file))
        names = [self.places.adapter_called(path) for path in recipe.adapters]  # before anything that it names is read
        self.places.base(recipe.base)
        read_recipe(Path(file))
        values = (
            recipe.base, recipe.prompt, recipe.negative_prompt, recipe.seed, 1, recipe.steps, recipe.guidance_scale,
            recipe.side, recipe.height,
        )  # fmt: skip
        rows = values_of(names, recipe.strengths)
        return note(f"The settings of {Path(file).name}."), *values, *rows, *shown(max(1, len(names)))

    def suit(self, name: str) -> tuple[Any, Any]:
        """Base and prompt that an adapter was made for."""
        return suited(self.places, name)


def build(studio: Studio) -> None:
    """The page."""
    generate = Generate(studio)
    adapters = AdapterRows(studio.places)
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
    event = go.click(
        plainly(generate.make_pictures), boxes, [said, gallery, last], api_name="generate", concurrency_id="device"
    )
    stop.click(None, cancels=[event])
    dropped.upload(plainly(generate.take_back), dropped, [said, *boxes, *adapters.length], api_name="recall")
    adapters.names[0].input(
        plainly(generate.suit), adapters.names[0], [base, prompt], api_visibility="private", queue=False
    )
    page = gr.context.Context.root_block
    page.load(adapters.choices, None, adapters.names, api_visibility="private", show_progress="hidden")
