"""Generate: images with any base and any number of adapters, and their settings back from an image."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.generate import parse_recipe, read_recipe
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ..backend.context import Studio
from ..backend.pipeline_worker import Job, JobStopped, run_in_background, save_images
from ..backend.recipes import build_recipe, suggested_base_and_prompt
from ..render.messages import message_html, progress_bar, show_errors
from ..widgets.adapter_rows import AdapterRows, row_values, row_visibility

MAX_IMAGES = 64  # images at once


class GeneratePage:
    """What the page's events do."""

    def __init__(self, studio: Studio) -> None:
        self.paths, self.worker = studio.paths, studio.worker

    def make_images(self, base: str, prompt: str, negative: str, seed: float, n: float, steps: float, guidance: float,
                      width: float, height: float, *rows: Any) -> Any:  # fmt: skip
        """Draws; yields progress, then the images and their seed."""
        if not 1 <= n <= MAX_IMAGES:
            raise UserError(f"The number of images must be between 1 and {MAX_IMAGES}, not {n:g}.")
        values = {
            "steps": steps, "guidance_scale": guidance, "width": width, "height": height,
            "seed": random.randrange(2**31) if seed < 0 else seed,
        }  # fmt: skip
        recipe = build_recipe(self.paths, base, prompt, negative, values, rows)
        batches = -(-int(n) // 4)
        try:
            for now in run_in_background(
                lambda drawing: self.worker.draw(recipe, int(n), drawing), batches * recipe.steps
            ):
                if isinstance(now, Job):
                    yield progress_bar(now.progress), gr.skip(), gr.skip()
                else:
                    yield (
                        message_html(f"Seed {recipe.seed}."),
                        save_images(now, self.paths.generated_folder(), "picture"),
                        recipe.seed,
                    )
        except JobStopped:
            yield message_html("Stopped."), gr.skip(), gr.skip()

    def recall_settings(self, file: str | None) -> tuple[Any, ...]:
        """The settings of an image, for every box, and for how many rows are shown."""
        if not file:
            raise UserError("Drop a PNG that was made here, or by rankfold sample.")
        recipe = parse_recipe(Path(file))
        if recipe.references:
            raise UserError(
                "This image was made from reference images, for which there is no place here yet: `rankfold sample --from` repeats it."
            )
        names = [self.paths.adapter_name(path) for path in recipe.adapters]  # before anything that it names is read
        self.paths.base(recipe.base)
        read_recipe(Path(file))
        values = (
            recipe.base, recipe.prompt, recipe.negative_prompt, recipe.seed, 1, recipe.steps, recipe.guidance_scale,
            recipe.width, recipe.height,
        )  # fmt: skip
        rows = row_values(names, recipe.strengths)
        return message_html(f"The settings of {Path(file).name}."), *values, *rows, *row_visibility(max(1, len(names)))

    def suggest_base_and_prompt(self, name: str) -> tuple[Any, Any]:
        """Base and prompt that an adapter was made for."""
        return suggested_base_and_prompt(self.paths, name)


def build(studio: Studio) -> None:
    """The page."""
    generate = GeneratePage(studio)
    adapters = AdapterRows(studio.paths)
    with gr.Row():
        base = gr.Dropdown([*EMBEDDED], value="tiny", allow_custom_value=True, label="Base model", elem_id="base")
        prompt = gr.Textbox(label="Prompt", value="a sks creature on the beach", lines=2, scale=2, elem_id="prompt")
        negative = gr.Textbox(label="Negative prompt", lines=2, scale=1)
    with gr.Row():
        seed = gr.Number(label="Seed (-1 = random)", value=-1, precision=0, min_width=120, elem_id="seed")
        n = gr.Number(label="Images", value=4, precision=0, minimum=1, maximum=MAX_IMAGES, min_width=120, elem_id="n")
        steps = gr.Number(label="Steps", value=25, precision=0, minimum=1, min_width=120, elem_id="steps")
        guidance = gr.Number(label="Guidance", value=2.0, min_width=120, elem_id="guidance")
        width = gr.Number(label="Width (0 = model default)", value=0, precision=0, min_width=120)
        height = gr.Number(label="Height (0 = same as width)", value=0, precision=0, min_width=120)
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", variant="stop")
    said = gr.HTML(label="Progress", elem_id="progress")
    gallery = gr.Gallery(label="Results", columns=4, height="max-content", format="png", elem_id="pictures")
    with gr.Row():
        dropped = gr.File(label="Drop an image to reuse its settings", file_types=[".png"], elem_id="dropped")

    boxes = [base, prompt, negative, seed, n, steps, guidance, width, height, *adapters.boxes]
    last = gr.Number(visible=False)
    event = go.click(
        show_errors(generate.make_images), boxes, [said, gallery, last], api_name="generate", concurrency_id="device"
    )
    stop.click(None, cancels=[event])
    dropped.upload(show_errors(generate.recall_settings), dropped, [said, *boxes, *adapters.length], api_name="recall")
    adapters.names[0].input(
        show_errors(generate.suggest_base_and_prompt),
        adapters.names[0],
        [base, prompt],
        api_visibility="private",
        queue=False,
    )
    page = gr.context.Context.root_block
    page.load(adapters.choices, None, adapters.names, api_visibility="private", show_progress="hidden")
