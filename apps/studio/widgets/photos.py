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
from ..backend.housekeeping import (
    delete_set,
    deletion_of_set,
    free_set_name,
    image_sets,
    own_set,
    remove_image,
    rename_set,
    set_folder,
)
from ..backend.paths import to_slug
from ..backend.pipeline_worker import Job, JobStopped, ModelCache, run_in_background
from ..render.messages import message_html, progress_bar, show_errors
from .actions import act
from .deletion import Deletion
from .filling import fill_on_load
from .form import Form
from .uploads import crop_preview, scan_folder, store_uploads, write_captions

SIDE = 160  # pixels of a thumbnail
FIRST_SET = "images-1"  # the name of a first set
SMALL = 64  # pixels: smaller images are pointed out


def folder_outputs(folder: Path, refused: list[str]) -> tuple[Any, ...]:
    """The folder, its images, its captions, and what was noticed."""
    found = scan_folder(folder)
    images = [
        (crop_preview(one, SIDE), f"{one.path.name}, {one.width} x {one.height}: {one.caption or 'no caption'}")
        for one in found
    ]
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
        self.turns = studio.turns
        self.folder, self.chosen = gr.State(""), gr.State("")
        with gr.Row():
            with gr.Column():
                self.files = gr.File(
                    label="Images, captions or a zip", file_count="multiple", elem_id="files", height=180,
                    file_types=["image", ".zip", ".txt"],
                )  # fmt: skip
                with gr.Row():
                    self.set_name = gr.Textbox(
                        label="Name of this set of images", value=FIRST_SET, elem_id="set-name", scale=2, min_width=160
                    )
                    self.add = gr.Button("Add these images", variant="primary", elem_id="add", scale=1, min_width=160)
            with gr.Column():
                self.known = gr.Dropdown(
                    [], label="Or a set that is here", allow_custom_value=True, elem_id="known-sets"
                )
                self.typed = gr.Textbox(
                    label="Or a folder on this machine", placeholder="/home/me/photos/cat", elem_id="folder"
                )
                self.use_folder_button = gr.Button("Use this folder", elem_id="use-folder")
        self.findings = gr.HTML(label="What was noticed", elem_id="findings")
        with gr.Column(visible=False) as self.present:
            self.build_present()
        self.message = gr.HTML(label="Captions written", elem_id="captions-said")

    def build_present(self) -> None:
        """The images that are there, with their captions."""
        self.gallery = gr.Gallery(
            label="As training will see them", columns=6, height="max-content", object_fit="contain", elem_id="crops",
            allow_preview=False, buttons=[], fit_columns=False,
        )  # fmt: skip
        self.captions = gr.Dataframe(
            headers=["image", "caption"], label="Captions", interactive=True, static_columns=[0], column_count=2,
            wrap=True, elem_id="captions", column_widths=["30%", "70%"],
        )  # fmt: skip
        with gr.Row():
            self.write = gr.Button("Save the captions", elem_id="save-captions")
            self.model = gr.Dropdown(
                [*EMBEDDED], value=next(iter(EMBEDDED)), allow_custom_value=True, label="Model that writes captions",
                info="tiny-vlm knows drawn images only; others: a hub id in the local cache, or a folder.",
                elem_id="caption-model",
            )  # fmt: skip
            self.ask = gr.Button("Write missing captions", elem_id="write-captions")
        with gr.Accordion("Remove an image; rename or delete this set", open=False, elem_id="set-actions"), gr.Row():
            with gr.Column(min_width=200):
                self.remove = gr.Button("Remove the chosen image", size="sm", elem_id="remove-image", interactive=False)
            with gr.Column(min_width=200):
                self.new_name = gr.Textbox(label="New name of this set", elem_id="set-new-name")
                self.rename = gr.Button("Rename", size="sm", elem_id="set-rename")
            with gr.Column(min_width=200):
                self.deletion = Deletion("Delete this set", "set")

    @property
    def outputs(self) -> list[Any]:
        """Where `folder_outputs` is shown."""
        return [self.folder, self.gallery, self.captions, self.findings]

    def wire(self, form: Form) -> None:
        """What the buttons do. form: the settings, for the subject's words."""
        shown, said = [*self.outputs, self.message], self.message
        act(
            self.add, self.add_files, [self.files, self.set_name, self.folder], [*shown, self.set_name], said, api_name="upload"
        )  # fmt: skip
        act(self.use_folder_button, self.use_folder, self.typed, shown, said, api_name="use_folder")
        act(self.known.input, self.open_set, self.known, [*shown, self.set_name], said)
        act(self.write, self.save_captions, [self.folder, self.captions], shown, said)
        self.wire_set(shown)

        def write_missing(folder: str, table: Any, model: str, text: str) -> Iterator[Any]:
            yield from self.write_missing_captions(folder, table, model, form.config(text))

        act(
            self.ask, write_missing, [self.folder, self.captions, self.model, form.yaml], [self.captions, self.message],
            said, concurrency_limit=None,
        )  # fmt: skip
        load = gr.context.Context.root_block.load
        load(lambda: gr.Dropdown(choices=available_bases()), None, self.model, api_visibility="private",
             show_progress="hidden", queue=False)  # fmt: skip
        fill_on_load(self.begin, None, [self.known, self.set_name], [])
        self.folder.change(
            lambda folder: (gr.Column(visible=bool(folder)), gr.Dropdown(choices=image_sets(self.paths))), self.folder,
            [self.present, self.known], api_visibility="private", show_progress="hidden", queue=False,
        )  # fmt: skip

    def show_kept(self, event: Any, kept: gr.State) -> Any:
        """After an event: the images of the folder in `kept`, unless others have been chosen meanwhile. Returns the last event."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        shown = gr.State("")

        def show(folder: str, before: str) -> tuple[Any, ...]:
            if folder == before:
                return (*[gr.skip()] * 4, before)
            return (*self.show_folder(folder)[1:], gr.Column(visible=bool(folder)), folder)

        event = event.then(lambda chosen, kept: chosen or kept, [self.folder, kept], self.folder, **quiet)
        for _ in range(2):  # again where another folder was chosen while the images of the first were read
            event = event.then(
                show_errors(show), [self.folder, shown], [*self.outputs[1:], self.present, shown], **quiet
            )
        return event

    def wire_set(self, shown: list[Any]) -> None:
        """What changes a set as a whole."""
        said, quiet = self.message, {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        self.gallery.select(show_errors(self.choose_image), self.folder, [self.chosen, self.remove], **quiet)
        act(self.remove, self.remove_chosen, [self.folder, self.chosen], [*shown, self.remove], said)
        act(self.rename, self.rename_chosen, [self.folder, self.new_name], [*shown, self.set_name, self.new_name], said)
        self.deletion.wire(
            lambda folder: deletion_of_set(self.paths, self.chosen_set(folder)),
            lambda folder: delete_set(self.paths, self.chosen_set(folder)),
            self.folder, said, lambda: ("", [], [], ""), self.outputs,
        )  # fmt: skip

    def begin(self) -> tuple[Any, Any]:
        """The sets that there are, and a name for another."""
        return gr.update(choices=image_sets(self.paths)), free_set_name(self.paths)

    def add_files(self, files: list[str] | None, wish: str, folder: str) -> tuple[Any, ...]:
        """Uploaded files into a new set, or into the one that is open."""
        if not files:
            raise UserError("No file has been chosen: drop images, captions (.txt) or a zip into the box.")
        name = to_slug(wish)
        if name in image_sets(self.paths) and own_set(self.paths, Path(folder or "/")) != name:
            raise UserError(
                f"There is a set named {name} already: choose it from the sets that are here to add to it, or give another name."
            )
        place = self.paths.upload_folder(name)
        said = store_uploads(files, place)
        if not place.is_dir():
            raise UserError(" ".join(["No set was made, for nothing of this can be used.", *said]))
        outputs = folder_outputs(place, said)
        return *outputs, message_html(f"Kept in the set {name}."), name

    def open_set(self, name: str | None) -> tuple[Any, ...]:
        """A set that is there."""
        return *folder_outputs(set_folder(self.paths, name or ""), []), "", name

    def use_folder(self, text: str) -> tuple[Any, ...]:
        """A folder that was typed."""
        return *folder_outputs(self.paths.readable_folder(text, "The folder"), []), ""

    def show_folder(self, folder: str) -> tuple[Any, ...]:
        """A folder that another part of the page has chosen."""
        return folder_outputs(self.chosen_folder(folder), []) if folder else ("", [], [], "")

    def choose_image(self, folder: str, event: gr.SelectData) -> tuple[str, Any]:
        """The image that was clicked."""
        names = [one.path.name for one in scan_folder(self.chosen_folder(folder))]
        name = names[event.index] if isinstance(event.index, int) and event.index < len(names) else ""
        return name, gr.Button(f"Remove {name}" if name else "Remove the chosen image", interactive=bool(name))

    def remove_chosen(self, folder: str, name: str) -> tuple[Any, ...]:
        """An image out of its set."""
        path = self.chosen_folder(folder)
        text = remove_image(self.paths, path, name)
        return *folder_outputs(path, []), message_html(text), gr.Button("Remove the chosen image", interactive=False)

    def rename_chosen(self, folder: str, wish: str) -> tuple[Any, ...]:
        """Another name for the set."""
        path = rename_set(self.paths, self.chosen_set(folder), to_slug(wish))
        return *folder_outputs(path, []), message_html(f"This set is now {path.name}."), path.name, ""

    def chosen_set(self, folder: str) -> str:
        """The set that is open.

        Raises:
            UserError: when it is none of the studio's own.
        """
        path = self.chosen_folder(folder)
        if not (name := own_set(self.paths, path)):
            raise UserError(f"{path} is a folder of yours: the studio renames and deletes only sets that it was given.")
        return name

    def save_captions(self, folder: str, table: Any) -> tuple[Any, ...]:
        """The table's captions beside the images."""
        path = self.chosen_folder(folder)
        write_captions(path, {str(row[0]): str(row[1] or "") for row in table.values.tolist()})
        return *folder_outputs(path, []), message_html("The captions are saved.")

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
            work = partial(caption_rows, rows, path, base, config, self.loaded)
            for now in run_in_background(work, missing, self.turns):
                if isinstance(now, Job):
                    yield rows, progress_bar(now.progress, now.ahead)
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
