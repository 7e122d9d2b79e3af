"""Where on an image each adapter has its figure."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..backend.several_subjects import ARRANGEMENTS, COLOURS, PAINTED, SIDE_BY_SIDE, TOGETHER, blank_canvas
from .mask_painter import RecentPaintings


class SubjectPlaces:
    """How several adapters share an image, and a canvas for their places."""

    def __init__(self) -> None:
        with gr.Accordion("Several subjects in one image", open=False, elem_id="generate-subjects"):
            self.arrangement: Any = gr.Radio(
                [*ARRANGEMENTS], value=TOGETHER, label="The adapters draw", elem_id="arrangement",
                info=f"“{SIDE_BY_SIDE}” and “{PAINTED}” give each adapter a figure by its trigger words, which the prompt holds, or has "
                "{subjects} for: a {subjects} on the beach. "
                f"Paint the places of adapters 1, 2, 3 and 4 in {', '.join(COLOURS)}; the box around a colour counts.",
            )  # fmt: skip
            colours = [f"rgb{colour}" for colour in COLOURS.values()]
            self.canvas = gr.ImageEditor(
                {"background": blank_canvas(), "layers": [], "composite": None},
                label="Places", type="pil", sources=(), layers=False, transforms=(),
                format="png", buttons=[], height=440, visible=False, eraser=gr.Eraser(default_size=40), elem_id="places",
                brush=gr.Brush(default_size=40, colors=colours, default_color=colours[0], color_mode="fixed"),
            )  # fmt: skip
        self.canvas.blob_storage = RecentPaintings()
        self.arrangement.change(
            lambda arrangement: gr.ImageEditor(visible=arrangement == PAINTED), self.arrangement, self.canvas,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip

    @property
    def boxes(self) -> list[Any]:
        """In the order in which `arrange` takes them."""
        return [self.arrangement, self.canvas]
