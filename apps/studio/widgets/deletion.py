"""A button that deletes: it first says what would be lost, and asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..render.messages import message_html
from .actions import act


class Deletion:
    """The button, and the question behind it."""

    def __init__(self, label: str, place: str) -> None:
        """place: the elements' ids begin with it."""
        self.ask = gr.Button(label, variant="stop", size="sm", elem_id=f"{place}-delete")
        with gr.Group(visible=False) as self.question:
            self.text = gr.HTML(label="What would be lost", elem_id=f"{place}-delete-said", padding=True)
            with gr.Row():
                self.go = gr.Button("Delete for good", variant="stop", size="sm", elem_id=f"{place}-delete-go")
                self.keep = gr.Button("Keep", size="sm", elem_id=f"{place}-delete-keep")

    def wire(
        self, describe: Callable[[Any], str], delete: Callable[[Any], str], inputs: Any, said: Any,
        after: Callable[[], Sequence[Any]] | None = None, outputs: Sequence[Any] = (), api_name: str | None = None,
    ) -> Any:  # fmt: skip
        """describe: what deleting loses, or why it cannot be; delete: does it, and says so; after: values of the outputs then."""

        def ask(*chosen: Any) -> tuple[Any, ...]:
            return gr.Group(visible=True), message_html(describe(*chosen)), ""

        def go(*chosen: Any) -> tuple[Any, ...]:
            text = delete(*chosen)
            return message_html(text), gr.Group(visible=False), *(after() if after else ())

        act(self.ask, ask, inputs, [self.question, self.text, said], said)
        self.keep.click(
            lambda: gr.Group(visible=False), None, self.question, api_visibility="private", queue=False, show_progress="hidden"
        )  # fmt: skip
        return act(self.go, go, inputs, [said, self.question, *outputs], said, api_name=api_name)
