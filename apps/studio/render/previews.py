"""Previews of a run by their steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gradio as gr

Previews = Sequence[tuple[str, str]]  # file, caption "step 100"


def preview_steps(previews: Previews) -> list[int]:
    """The steps that there are previews of, in order."""
    return sorted({int(caption.split()[-1]) for _, caption in previews})


def at_step(previews: Previews, step: int) -> list[list[str]]:
    """The previews of the step nearest to one."""
    steps = preview_steps(previews)
    if not steps:
        return []
    nearest = min(steps, key=lambda one: abs(one - step))
    return [[file, caption] for file, caption in previews if caption == f"step {nearest}"]


def step_slider(previews: Previews, step: int) -> tuple[Any, Any]:
    """The slider over the steps, and the previews at its place; whoever is at the newest but one goes on to the newest."""
    steps = preview_steps(previews)
    if not steps:
        return gr.Slider(visible=False), []
    value = step if step in steps[:-2] else steps[-1]
    gaps = [after - before for before, after in pairwise(steps)]
    slider = gr.Slider(
        minimum=steps[0], maximum=max(steps[-1], steps[0] + 1), step=min(gaps) if gaps else 1, value=value, visible=len(steps) > 1
    )  # fmt: skip
    return slider, at_step(previews, value)
