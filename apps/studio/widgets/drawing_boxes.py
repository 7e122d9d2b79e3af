"""The boxes for steps and guidance of the pages that draw: empty ones mean the base's own, which stand in them in grey.

Boxes of text, for Gradio shows an empty box of numbers as 0, and sends it.
"""

from __future__ import annotations

import gradio as gr

from ....training.config.defaults import drawing_defaults

STEPS, GUIDANCE = drawing_defaults("tiny")


def steps_box(elem_id: str) -> gr.Textbox:
    """Denoising steps; empty for the base's own."""
    return gr.Textbox(label="Steps", placeholder=f"{STEPS}", min_width=90, elem_id=elem_id)


def guidance_box(elem_id: str) -> gr.Textbox:
    """Classifier-free guidance; empty for the base's own."""
    return gr.Textbox(label="Guidance", placeholder=f"{GUIDANCE:g}", min_width=110, elem_id=elem_id)
