"""Train: a subject from images, or a task from questions about images."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..backend.context import Studio
from ..widgets.subject_run import subject_tab
from ..widgets.task_run import task_tab


def build(studio: Studio) -> None:
    """The page."""
    with gr.Tabs() as tabs:
        with gr.Tab("A subject", id="subject"):
            subject_tab(studio)
        with gr.Tab("A task", id="instruct"):
            task_tab(studio)
    gr.context.Context.root_block.load(
        choose_tab, None, tabs, api_visibility="private", show_progress="hidden", queue=False
    )


def choose_tab(request: gr.Request) -> Any:
    """The tab that the page's address names."""
    return gr.Tabs(selected="instruct" if request.query_params.get("tab") == "task" else "subject")
