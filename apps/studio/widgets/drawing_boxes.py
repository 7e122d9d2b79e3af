"""The boxes for steps and guidance of the pages that draw: empty ones mean the base's own, which stand in them in grey."""

from __future__ import annotations

import gradio as gr

from ....training.config.defaults import drawing_defaults

STEPS, GUIDANCE = drawing_defaults("tiny")


def steps_box(elem_id: str) -> gr.Number:
    """Denoising steps; None for the base's own."""
    return gr.Number(label="Steps", placeholder=f"{STEPS}", min_width=90, elem_id=elem_id)


def guidance_box(elem_id: str) -> gr.Number:
    """Classifier-free guidance; None for the base's own."""
    return gr.Number(label="Guidance", placeholder=f"{GUIDANCE:g}", min_width=110, elem_id=elem_id)
