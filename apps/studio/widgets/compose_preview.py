"""An image of what a composition will do, before it is made: its adapters side by side at its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ....pipelines.generate import Recipe
from ....toolkit.core.errors import UserError
from ....training.config.compose import ComposeConfig
from ..backend.adapter_list import find_adapter
from ..backend.context import Studio
from ..backend.pipeline_worker import Job, JobStopped, run_in_background
from ..backend.recipes import build_recipe
from ..render.messages import message_html, progress_bar

SETTINGS = {"steps": 25, "guidance_scale": 2.0, "width": 0, "height": 0}


class ComposePreview:
    """Its boxes, and what its button does."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Accordion("Preview", open=False, elem_id="compose-preview"), gr.Row():
            with gr.Column(scale=2, min_width=240):
                self.prompt = gr.Textbox(
                    label="Prompt of the preview", info="Empty: the trigger words of all.", lines=2, elem_id="compose-prompt"
                )  # fmt: skip
                self.seed = gr.Number(label="Seed (-1 = random)", value=0, elem_id="compose-seed")
                self.go = gr.Button("Preview image", elem_id="compose-preview-go")
                self.said = gr.HTML(label="Preview", elem_id="compose-preview-said")
            with gr.Column(scale=1, min_width=240):
                self.image = gr.Image(
                    label="Preview image", format="png", interactive=False, height=260, elem_id="compose-preview-image"
                )  # fmt: skip

    def recipe(self, config: ComposeConfig, names: Sequence[str], prompt: str, seed: float) -> Recipe:
        """The image that is drawn.

        Raises:
            UserError: for weights that are learned, which nobody knows yet.
        """
        if config.images is not None:
            raise UserError(
                "Learned weights are known when they are learned: compose it, and look at it on the Watch page."
            )
        weights = config.weights or [1 / len(names)] * len(names)
        words = [find_adapter(self.studio.paths, name).trigger for name in names]
        wanted = prompt.strip() or " and ".join(f"a {one}" for one in dict.fromkeys(filter(None, words)))
        rows = tuple(value for name, weight in zip(names, weights, strict=True) for value in (True, name, weight))
        return build_recipe(self.studio.paths, config.base, wanted, "", SETTINGS | {"seed": seed}, rows)

    def draw(self, config: ComposeConfig, names: Sequence[str], prompt: str, seed: float) -> Iterator[Any]:
        """Draws; yields progress, and the image."""
        recipe = self.recipe(config, names, prompt, seed)
        cut = " Without the limited rank, which may change it a little." if config.max_rank else ""
        try:
            for now in run_in_background(
                lambda drawing: self.studio.worker.draw(recipe, 1, drawing), recipe.steps, self.studio.turns
            ):
                if isinstance(now, Job):
                    yield progress_bar(now.progress, now.ahead), gr.skip()
                else:
                    yield message_html(f"“{recipe.prompt}”, seed {recipe.seed}. It is not kept.{cut}"), now[0][0]
        except JobStopped:
            yield message_html("Stopped."), gr.skip()
