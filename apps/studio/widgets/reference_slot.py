"""The place on a page for the references that images are made from."""

from __future__ import annotations

from typing import Any

import gradio as gr


class ReferenceSlot:
    """Images in their order, for bases that make an image from others."""

    def __init__(self, page: str) -> None:
        with gr.Accordion("Reference images", open=False, elem_id=f"{page}-references"):
            self.gallery = gr.Gallery(
                label="For bases that make an image from others (rankfold sample --reference), in their order", type="filepath",
                interactive=True, file_types=["image"], columns=4, height=220, object_fit="contain", elem_id=f"{page}-reference-images",
            )  # fmt: skip
        self.files: Any = gr.File(label="References", file_count="multiple", file_types=["image"], visible=False)
        """The same for programs."""
