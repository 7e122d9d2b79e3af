"""The place on the Train page for references: the sets and folders of images that the training images are made from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ..backend.housekeeping import free_set_name, image_sets, set_folder
from ..backend.paths import StudioPaths, to_slug
from ..render.messages import message_html, show_errors
from .actions import act
from .form import External
from .uploads import store_uploads

WISH = "references"


class ReferenceSets:
    """Sets of references, chosen, or uploaded; the form's setting `references`."""

    def __init__(self, paths: StudioPaths) -> None:
        self.paths = paths
        with gr.Accordion("References: images that these are made from", open=False, elem_id="train-references"):
            self.chosen = gr.Dropdown(
                self.choices(), value=[], multiselect=True, allow_custom_value=True, label="Sets or folders of references, in their order",
                info="In each, an image of the same name for every image above, whose caption says what becomes of it. For bases that make "
                "images from images (FLUX.1 Kontext, FLUX.2 and others).",
                elem_id="reference-sets",
            )  # fmt: skip
            with gr.Row():
                self.files = gr.File(
                    label="Images or a zip", file_count="multiple", elem_id="reference-files", height=140,
                    file_types=["image", ".zip"],
                )  # fmt: skip
                with gr.Column():
                    self.name = gr.Textbox(
                        label="Name of this set of references", value=f"{WISH}-1", elem_id="reference-set-name"
                    )
                    self.add = gr.Button("Add these references", elem_id="add-references")
            self.said = gr.HTML(label="References added", elem_id="references-said")

    @property
    def external(self) -> External:
        """The form's setting."""
        return External(self.chosen, lambda chosen: [str(one) for one in chosen or []], lambda folders: folders or [])

    def choices(self) -> list[tuple[str, str]]:
        """The sets that there are, and their folders."""
        return [(name, str(set_folder(self.paths, name))) for name in image_sets(self.paths)]

    def wire(self, sets: Any) -> None:
        """What happens. sets: State that changes when a set is made."""
        outputs = [self.chosen, self.files, self.name, self.said]
        act(self.add, self.add_files, [self.files, self.name, self.chosen], outputs, self.said)
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        sets.change(show_errors(self.listed), None, self.chosen, **quiet)
        gr.context.Context.root_block.load(show_errors(self.listed), None, self.chosen, **quiet)

    def listed(self) -> Any:
        """The sets that there are now."""
        return gr.update(choices=self.choices())

    def add_files(self, files: list[str] | None, wish: str, chosen: list[str] | None) -> tuple[Any, ...]:
        """Uploaded files as a set of references behind those that are chosen."""
        if not files:
            raise UserError("No file has been chosen: drop the references, or a zip of them, into the box.")
        name = to_slug(wish)
        if name in image_sets(self.paths):
            raise UserError(f"There is a set named {name} already: choose it from the list, or give another name.")
        place = self.paths.upload_folder(name)
        refused = store_uploads(files, place)
        if not place.is_dir():
            raise UserError(" ".join(["No set was made, for nothing of this can be used.", *refused]))
        text = message_html(f"Kept in the set {name}.") + "".join(message_html(line, "fault") for line in refused)
        box = gr.Dropdown(choices=self.choices(), value=[*(chosen or []), str(place)], allow_custom_value=True)
        return box, None, free_set_name(self.paths, WISH), text
