"""The tab for tasks of the Train page: questions and answers about images, base and settings, start."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.data.conversations import read_conversations
from ..backend.context import Studio
from ..backend.housekeeping import delete_set, image_sets
from ..backend.paths import StudioPaths, to_slug
from ..backend.run_paths import check_media, check_paths
from ..backend.submit import enqueue_run
from ..render.messages import message_html, show_errors
from ..render.rows import rows_html
from .actions import act
from .filling import fill_on_load, suggest_next
from .form import Form, run_name_box
from .uploads import store_uploads

FIRST = "task-1"  # the name of a first run
TASK = ("base", "data", "images", "steps")


def task_tab(studio: Studio) -> None:
    """A vision-language model: data, settings, start."""
    places, form = studio.paths, Form("instruct", TASK)

    def begin_task(text: str, name: str) -> tuple[str, str]:
        config = check_paths(form.config(text), places, to_slug(name))
        check_media(config, places)
        return enqueue_run(studio, config)

    def start_shown(written: Any, text: str, *boxes: Any) -> tuple[Any, ...]:
        settled = form.settle(written, text, *boxes)
        link, free = begin_task(settled[0], form.config(settled[0]).out.name)
        return *settled, link, [boxes[-1], free]

    def show_rows(written: Any, text: str, *boxes: Any) -> str:
        config: Any = check_paths(form.config(form.settle(written, text, *boxes)[0]), places, places.free_name("look"))
        if config.data is None:
            raise UserError("There is no data yet: upload a file, or name one.")
        check_media(config, places)
        found = read_conversations(
            config.data,
            config.images,
            skip_bad=True,
            columns=config.columns,
            split=config.split,
            learn=config.learn_turns,
        )
        return rows_html(found.rows)

    gr.Markdown("## 1. Questions and answers")
    with gr.Row():
        files = gr.File(
            label="Rows (.json, .jsonl, .csv) with their images, or a zip of both", file_count="multiple", elem_id="task-files",
            height=150,
        )  # fmt: skip
        with gr.Column():
            set_name = gr.Textbox(label="Name of this data", value="task-data", elem_id="task-set-name")
            add = gr.Button("Add these files", elem_id="task-add")
            look = gr.Button("Show the first rows", elem_id="task-look")
    rows = gr.HTML(label="Rows", elem_id="task-rows")
    gr.Markdown("## 2. Base and settings")
    form.build_basic()
    form.build_rest()
    gr.Markdown("## 3. Start")
    with gr.Row():
        name = run_name_box(form, places, FIRST, "task-name")
        begin = gr.Button("Start", variant="primary", size="lg", elem_id="start-task")
    started = gr.HTML(label="Started", elem_id="task-started")
    form.build_yaml()
    form.wire()
    sides = [form.written, form.yaml, *form.boxes]
    data, images = form.widgets["data"], form.widgets["images"]
    act(add, lambda given, wish: add_rows(places, given, wish), [files, set_name], [data, images, rows], rows).then(
        show_errors(form.from_boxes), sides, form.sides, api_visibility="private", show_progress="hidden"
    )  # fmt: skip
    act(look, show_rows, sides, [rows], rows)
    names = gr.JSON(visible=False, label="Values that a page fills in")
    suggest_next(act(begin, start_shown, sides, [*form.sides, started, names], started), names, name)
    fill_on_load(lambda: places.free_name(FIRST), None, [name], []).then(
        show_errors(form.from_boxes), sides, form.sides, api_visibility="private", show_progress="hidden", queue=False
    )
    gr.on([], show_errors(begin_task), [form.yaml, name], [started, name], api_name="start_task")


def add_rows(paths: StudioPaths, files: list[str] | None, wish: str) -> tuple[str, str, str]:
    """Uploaded rows and images into a set: the file with the rows, the folder with the images, and a sentence."""
    if not files:
        raise UserError("No file has been chosen: drop rows (.json, .jsonl or .csv) and their images into the box.")
    name = to_slug(wish)
    if name in image_sets(paths):
        raise UserError(f"There is a set named {name} already: give another name.")
    folder = paths.upload_folder(name)
    refused = store_uploads(files, folder)
    kept = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in kept if path.suffix.lower() in (".jsonl", ".json", ".csv")]
    if not found:
        if kept:
            delete_set(paths, name)
        raise UserError(" ".join(["There are no rows among these files: add a .json, .jsonl or .csv.", *refused]))
    said = message_html(f"{found[0].name} is kept in the set {name}.") + "".join(
        message_html(one, "fault") for one in refused
    )
    return str(found[0]), str(folder), said
