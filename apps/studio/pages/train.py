"""Train: pictures, base, adapter and settings; what it will take; into the queue."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.base import LoopConfig
from ....training.config.instruct import ConversationConfig
from ....training.config.subject import SubjectConfig
from ....training.embedded.demo import DEMO_SETTINGS
from ..backend.context import Studio
from ..backend.paths import Places
from ..backend.submit import queued
from ..render.messages import note, plainly, time_left
from ..widgets.fields import values_of, yaml_of
from ..widgets.form import Form
from ..widgets.photos import PhotoStep, shown

SUBJECT = ("base", "adapter", "token", "class_noun", "steps", "rank", "learning_rate", "seed")
TASK = ("base", "adapter", "data", "images", "steps", "rank", "learning_rate", "seed")
QUICK, STANDARD, THOROUGH = "Quick look", "Standard", "Thorough"
STEPS = {QUICK: 0.3, STANDARD: 1.0, THOROUGH: 2.5}
PATHS = ("images", "masks", "evaluate_images", "chat_template", "data", "replay", "held_out")


def preset(name: str, base: str) -> dict[str, Any]:
    """Settings that suit a base: those of the demo for embedded ones, careful ones for others."""
    if base in DEMO_SETTINGS:
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in DEMO_SETTINGS[base].items()}
        return settings | {"steps": round(300 * STEPS[name])}
    settings = {"learning_rate": 1e-4, "batch_size": 1, "gradient_checkpointing": True, "precision": "bf16"}
    return settings | {"steps": round(800 * STEPS[name]), "rank": 16, "alpha": 16.0}


def checked(config: LoopConfig, places: Places, name: str) -> LoopConfig:
    """The config with the run's folder set, if all its paths may be read.

    Raises:
        UserError: for a path outside what the studio may read.
    """
    values: dict[str, Any] = {"out": places.new_run(name)}
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    for key in PATHS:
        text = str(getattr(config, key, None) or "")
        if key in known and text and not (key == "masks" and text == "alpha"):
            path = places.readable_path(text, f"The path of {key}")
            values[key] = str(path) if key == "masks" else path
    embedded = EMBEDDED_VISION if isinstance(config, ConversationConfig) else EMBEDDED
    values["base"] = places.base(getattr(config, "base", ""), tuple(embedded))
    if isinstance(config, SubjectConfig):
        values["also"] = {
            key: str(places.readable_folder(text, "The folder of also")) for key, text in config.also.items()
        }
        if config.evaluate_prompts and config.evaluate_prompts not in ("object", "live", "world"):
            values["evaluate_prompts"] = str(places.readable_path(config.evaluate_prompts, "The prompts"))
    return replace(config, **values)  # type: ignore[type-var]


def build(studio: Studio) -> None:
    """The page."""
    with gr.Tabs():
        with gr.Tab("A subject, from pictures", id="subject"):
            subject_tab(studio)
        with gr.Tab("A task, from questions about pictures", id="instruct"):
            task_tab(studio)


def subject_tab(studio: Studio) -> None:
    """Pictures, settings, start."""
    form = Form("subject", SUBJECT, hidden=("out", "images"))
    gr.Markdown("## 1. Pictures")
    photos = PhotoStep(studio)
    gr.Markdown("## 2. Settings")
    wish = gr.Radio([QUICK, STANDARD, THOROUGH], label="Preset for the chosen base", value=STANDARD, elem_id="preset")
    form.build_basic()
    form.build_rest()
    form.build_yaml()
    gr.Markdown("## 3. Start")
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="run-1", elem_id="run-name")
        ask = gr.Button("What will it take?", elem_id="plan")
        begin = gr.Button("Start", variant="primary", elem_id="start")
    taken = gr.HTML(label="Estimate", elem_id="estimate")
    started = gr.HTML(label="Started", elem_id="started")

    @plainly
    def take_preset(name: str, text: str) -> tuple[Any, ...]:
        config = form.config(text)
        new = yaml_of(form.method, values_of(config) | preset(name, config.base))  # type: ignore[attr-defined]
        return new, *form.from_yaml(new)

    @plainly
    def what_it_takes(folder: str, text: str) -> str:
        config = checked(form.config(text), studio.places, studio.places.free_name("estimate"))
        return estimate(replace(config, images=Path(folder) if folder else None))  # type: ignore[type-var]

    @plainly
    def begin_run(folder: str, text: str, name: str) -> tuple[str, str]:
        if not folder:
            raise UserError("There are no pictures yet: add some in step 1.")
        config: Any = replace(form.config(text), images=Path(folder))  # type: ignore[type-var]
        return queued(studio, checked(config, studio.places, name))

    @plainly
    def cloned(request: gr.Request) -> tuple[Any, ...]:
        return settings_of(studio.places, form, request.query_params.get("clone"))

    form.wire()
    photos.wire(form)
    filled = [form.yaml, form.command, form.said, form.options, *form.widgets.values()]
    wish.input(take_preset, [wish, form.yaml], filled, api_visibility="private")
    ask.click(what_it_takes, [photos.folder, form.yaml], taken, api_name="plan")
    begin.click(begin_run, [photos.folder, form.yaml, name], [started, name], api_name="start")
    page = gr.context.Context.root_block
    page.load(cloned, None, [*photos.shown_in, *filled, name], api_visibility="private", show_progress="hidden")


def settings_of(places: Places, form: Form, name: str | None) -> tuple[Any, ...]:
    """Pictures, settings and a free name: those of a run, or those to begin with.

    Raises:
        UserError: for a run that is none on a subject.
    """
    if not name:
        text = yaml_of(form.method, preset(STANDARD, "tiny"))
        return (*(gr.skip() for _ in range(4)), text, *form.from_yaml(text), places.free_name("run-1"))
    config = places.config(name)
    if not isinstance(config, SubjectConfig) or config.images is None:
        raise UserError(f"{name} is no run on a subject: only their settings can be used here.")
    text = yaml_of(
        form.method, {key: value for key, value in values_of(config).items() if key not in ("out", "images")}
    )
    return (*shown(config.images, []), text, *form.from_yaml(text), places.free_name(name))


def estimate(config: Any) -> str:
    """Memory, numbers, disk and time that a run will take, and advice."""
    from ....training.launch.plan import advice, disk, least_seconds, plan

    found = plan(config)
    lines = [
        f"Memory at the peak: {found.peak / 2**30:.2f} GiB (the base {found.base / 2**30:.2f}, the adapter "
        f"{found.adapter / 2**30:.3f}, the step {found.working / 2**30:.2f}).",
        f"{found.parameters:,} numbers are trained; {disk(found) / 2**20:.0f} MiB on the disk.",
        f"At least {time_left(least_seconds(found))} for {config.steps} steps.",
        *advice(found),
    ]
    return "".join(map(note, lines))


def task_tab(studio: Studio) -> None:
    """A vision-language model: data, settings, start."""
    places, form = studio.places, Form("instruct", TASK)

    @plainly
    def begin_task(text: str, name: str) -> tuple[str, str]:
        return queued(studio, checked(form.config(text), places, name))

    form.build_basic()
    form.build_rest()
    form.build_yaml()
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="task-1", elem_id="task-name")
        begin = gr.Button("Start", variant="primary", elem_id="start-task")
    started = gr.HTML(label="Started", elem_id="task-started")
    form.wire()
    begin.click(begin_task, [form.yaml, name], [started, name], api_name="start_task")
