"""Step 1 of the Train page: images into a set, checked, shown as training will see them, and captioned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.caption import generate_captions
from ....pipelines.chat import open_chat
from ....toolkit.core.devices import device
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED as EMBEDDED_BASES
from ....toolkit.vlm.model import EMBEDDED, available_bases
from ....training.config.defaults import EMBEDDED_SETTINGS
from ..backend.context import Studio
from ..backend.pipeline_worker import Job, JobStopped, ModelCache, run_in_background
from ..render.messages import message_html, progress_bar, show_errors
from .form import Form
from .uploads import crop_preview, scan_folder, store_uploads, write_captions

SIDE = 160  # pixels of a thumbnail
SMALL = 64  # pixels: smaller images are pointed out


def folder_outputs(folder: Path, refused: list[str]) -> tuple[Any, ...]:
    """The folder, its images, its captions, and what was noticed."""
    found = scan_folder(folder)
    images = [(crop_preview(one, SIDE), f"{one.path.name}, {one.width} x {one.height}") for one in found]
    bare = sum(not one.caption for one in found)
    lines = [f"{len(found)} images."]
    if bare:
        lines.append(f"{bare} have no caption: they are trained with the subject's prompt.")
    lines += [f"{one.path.name} looks like {one.like}: keep one of them." for one in found if one.like]
    lines += [
        f"{one.path.name} is small, less than {SMALL} pixels." for one in found if min(one.width, one.height) < SMALL
    ]
    text = "".join(map(message_html, lines)) + "".join(message_html(line, "fault") for line in refused)
    return str(folder), images, [[one.path.name, one.caption] for one in found], text


def caption_rows(rows: list[list[str]], folder: Path, base: str, config: Any, loaded: ModelCache, drawing: Job) -> int:
    """Fills the rows (image, caption) that have no caption, one after another; returns how many.

    Raises:
        Stopped: when somebody wants it to end; what was written until then stands in the rows.
    """
    empty = [row for row in rows if not row[1].strip()]
    noun = config.class_noun or (EMBEDDED_SETTINGS["class_noun"] if config.base in EMBEDDED_BASES else "")
    if not noun:
        raise UserError("Say first what it is (dog, person, mug ...): captions name it.")
    with loaded.lock:
        vision = loaded.get(("captions", base), lambda: open_chat(base, device=device()))
        made = generate_captions(vision, [folder / row[0] for row in empty], config.token, noun)
        for row, text in zip(empty, made, strict=True):
            row[1] = text
            drawing.step()
    return len(empty)


class PhotoStep:
    """The boxes of step 1. folder: a State with the chosen folder."""

    def __init__(self, studio: Studio) -> None:
        self.paths, self.loaded = studio.paths, studio.model_cache
        self.folder = gr.State("")
        with gr.Row():
            with gr.Column():
                self.files = gr.File(
                    label="Images, captions or a zip", file_count="multiple", elem_id="files",
                    file_types=["image", ".zip", ".txt"],
                )  # fmt: skip
                self.set_name = gr.Textbox(label="Name of this set of images", value="my-subject", elem_id="set-name")
                self.add = gr.Button("Add these images", variant="primary", elem_id="add")
            with gr.Column():
                self.typed = gr.Textbox(
                    label="Or a folder on this machine", placeholder="/home/me/photos/cat", elem_id="folder"
                )
                self.use_folder_button = gr.Button("Use this folder", elem_id="use-folder")
        self.findings = gr.HTML(label="What was noticed", elem_id="findings")
        self.gallery = gr.Gallery(
            label="As training will see them", columns=6, height="max-content", object_fit="contain", elem_id="crops"
        )
        self.captions = gr.Dataframe(
            headers=["image", "caption"], label="Captions", interactive=True, static_columns=[0], column_count=2,
            wrap=True, elem_id="captions",
        )  # fmt: skip
        with gr.Row():
            self.write = gr.Button("Save the captions", elem_id="save-captions")
            self.model = gr.Dropdown(
                [*EMBEDDED], value=next(iter(EMBEDDED)), allow_custom_value=True, label="Model that writes captions",
                info="tiny-vlm knows drawn images only; others: a hub id in the local cache, or a folder.",
                elem_id="caption-model",
            )  # fmt: skip
            self.ask = gr.Button("Write missing captions", elem_id="write-captions")
        self.message = gr.HTML(label="Captions written", elem_id="captions-said")

    @property
    def outputs(self) -> list[Any]:
        """Where `folder_outputs` is shown."""
        return [self.folder, self.gallery, self.captions, self.findings]

    def wire(self, form: Form) -> None:
        """What the buttons do. form: the settings, for the subject's words."""
        self.add.click(show_errors(self.add_files), [self.files, self.set_name], self.outputs, api_name="upload")
        self.use_folder_button.click(show_errors(self.use_folder), self.typed, self.outputs, api_name="use_folder")
        self.write.click(
            show_errors(self.save_captions), [self.folder, self.captions], self.outputs, api_visibility="private"
        )

        @show_errors
        def write_missing(folder: str, table: Any, model: str, text: str) -> Iterator[Any]:
            yield from self.write_missing_captions(folder, table, model, form.config(text))

        self.ask.click(
            write_missing, [self.folder, self.captions, self.model, form.yaml], [self.captions, self.message],
            api_visibility="private", concurrency_id="device",
        )  # fmt: skip
        load = gr.context.Context.root_block.load
        load(lambda: gr.Dropdown(choices=available_bases()), None, self.model, api_visibility="private",
             show_progress="hidden", queue=False)  # fmt: skip

    def add_files(self, files: list[str] | None, name: str) -> tuple[Any, ...]:
        """Uploaded files into a set."""
        if not files:
            raise UserError("No file has been chosen: drop images, captions (.txt) or a zip into the box.")
        folder = self.paths.upload_folder(name)
        return folder_outputs(folder, store_uploads(files, folder))

    def use_folder(self, text: str) -> tuple[Any, ...]:
        """A folder that was typed."""
        return folder_outputs(self.paths.readable_folder(text, "The folder"), [])

    def save_captions(self, folder: str, table: Any) -> tuple[Any, ...]:
        """The table's captions beside the images."""
        path = self.chosen_folder(folder)
        write_captions(path, {str(row[0]): str(row[1] or "") for row in table.values.tolist()})
        return folder_outputs(path, [])

    def save_edited(self, folder: str, table: Any) -> str:
        """Writes the captions of the table that are others than those beside the images; says how many."""
        if not folder:
            return ""
        path = self.chosen_folder(folder)
        kept = {one.path.name: one.caption for one in scan_folder(path)}
        shown = {str(row[0]): str(row[1] or "") for row in table.values.tolist() if row[0]}
        edited = {name: text for name, text in shown.items() if text.strip() != kept.get(name, "").strip()}
        if not edited:
            return ""
        write_captions(path, edited)
        return message_html(f"{len(edited)} edited captions were saved.")

    def write_missing_captions(self, folder: str, table: Any, model: str, config: Any) -> Iterator[Any]:
        """The table with its missing captions written by a model, as they come."""
        path, base = self.chosen_folder(folder), self.paths.base(model, tuple(EMBEDDED))
        rows = [[str(name), str(text or "")] for name, text in table.values.tolist()]
        known = {file.name for file in path.iterdir()}
        if unknown := next((name for name, _ in rows if name not in known), None):
            raise UserError(f"There is no image named {unknown[:60]!r}.")
        missing = sum(not text.strip() for _, text in rows)
        if not missing:
            raise UserError("Every image has a caption: empty those in the table that should be rewritten.")
        try:
            for now in run_in_background(partial(caption_rows, rows, path, base, config, self.loaded), missing):
                if isinstance(now, Job):
                    yield rows, progress_bar(now.progress)
                else:
                    yield rows, message_html(f"{now} captions written by {model}: read them, then save them.")
        except JobStopped:
            yield rows, message_html("Stopped.")

    def chosen_folder(self, folder: str) -> Path:
        """The folder that was chosen.

        Raises:
            UserError: when there is none yet.
        """
        if not folder:
            raise UserError("There are no images yet: add some first.")
        return self.paths.readable_folder(folder, "The folder")
