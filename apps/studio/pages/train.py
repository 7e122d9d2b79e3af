"""Train: images, base, adapter and settings; what it will take; into the queue."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.data.conversations import read_conversations
from ....toolkit.data.subjects import ALPHA, find_samples
from ....toolkit.data.videos import medium_parts
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.base import LoopConfig
from ....training.config.defaults import EMBEDDED_SETTINGS
from ....training.config.instruct import ConversationConfig
from ....training.config.shares import split_share
from ....training.config.subject import NO_PROMPTS, SubjectConfig
from ....training.embedded.demo import DEMO_SETTINGS
from ....training.runs.begin import SOURCES
from ..backend.comparison import parse_clip_model
from ..backend.context import Studio
from ..backend.paths import StudioPaths
from ..backend.submit import enqueue_run
from ..render.messages import format_duration, message_html, show_errors
from ..widgets.fields import config_values, values_to_yaml
from ..widgets.form import Form
from ..widgets.photos import PhotoStep, folder_outputs

SUBJECT = ("base", "adapter", "token", "class_noun", "steps", "rank", "learning_rate", "seed")
TASK = ("base", "adapter", "data", "images", "steps", "rank", "learning_rate", "seed")
QUICK, STANDARD, THOROUGH = "Quick look", "Standard", "Thorough"
STEPS = {QUICK: 0.3, STANDARD: 1.0, THOROUGH: 2.5}


def preset(name: str, base: str) -> dict[str, Any]:
    """Settings that suit a base: those of the demo for embedded ones, the base's own for others."""
    if base in DEMO_SETTINGS:
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in DEMO_SETTINGS[base].items()}
        return settings | {"steps": round(300 * STEPS[name])}
    own = dict.fromkeys((*EMBEDDED_SETTINGS, "alpha"), None) | {"class_noun": ""}  # unset: the base's own
    return own | {"steps": round(800 * STEPS[name])}


def with_base_preset(values: dict[str, Any], applied: tuple[str, str], base: str) -> dict[str, Any]:
    """The values with the preset of another base, but for those that somebody has set. applied: the preset's name and former base."""
    name, former = applied
    before, after = preset(name, former), preset(name, base)
    return values | {key: value for key, value in after.items() if values.get(key) == before.get(key)}


def check_paths(config: LoopConfig, paths: StudioPaths, name: str) -> LoopConfig:
    """The config with the run's folder set, if all its paths may be read.

    Raises:
        UserError: for a path outside what the studio may read.
    """
    values: dict[str, Any] = {"out": paths.new_run(name)}
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    for key in SOURCES:
        given = getattr(config, key, None) if key in known and key not in ("base", "evaluate_prompts") else None
        if isinstance(given, tuple):
            values[key] = tuple(paths.readable_path(str(one), f"The path of {key}") for one in given)
        elif given and not (key == "masks" and given == ALPHA):
            values[key] = type(given)(paths.readable_path(str(given), f"The path of {key}"))
    if more := getattr(config, "more_data", ()):
        values["more_data"] = tuple(
            str(paths.readable_path(name, "The path of more_data")) + share for name, share in map(split_share, more)
        )
    if clip := getattr(config, "evaluate_clip", ""):
        values["evaluate_clip"] = parse_clip_model(paths, "", clip)
    embedded = EMBEDDED_VISION if isinstance(config, ConversationConfig) else EMBEDDED
    values["base"] = paths.base(getattr(config, "base", ""), tuple(embedded))
    if isinstance(config, SubjectConfig):
        values["also"] = {
            key: str(paths.readable_folder(text, "The folder of also")) for key, text in config.also.items()
        }
        check_references(config, paths)
        if config.evaluate_prompts and config.evaluate_prompts not in ("object", "live", "world", NO_PROMPTS):
            values["evaluate_prompts"] = str(paths.readable_path(config.evaluate_prompts, "The prompts"))
    return replace(config, **values)  # type: ignore[type-var]


def check_references(config: SubjectConfig, paths: StudioPaths) -> None:
    """Raises UserError when a table beside the images names a reference outside what the studio may read."""
    for sample in find_samples(config.images, skip_bad=True) if config.images else ():
        for path in sample.references:
            paths.readable_path(str(path), f"The reference of {sample.path.name}")


def check_media(config: Any, paths: StudioPaths) -> None:
    """Raises UserError when a row of the data names an image or video outside what the studio may read."""
    more = [Path(name) for name, _ in map(split_share, config.more_data)]
    for file in [file for file in (config.data, *more, config.replay, config.evaluate_data) if file is not None]:
        found = read_conversations(
            file, config.images, skip_bad=config.skip_bad, columns=config.columns, split=config.split
        )
        parts = {part for row in found.rows for medium in row.images for part in medium_parts(medium)}
        for part in parts:
            if isinstance(part, Path):
                paths.readable_path(str(part), f"{file.name}: the image")


def build(studio: Studio) -> None:
    """The page."""
    with gr.Tabs():
        with gr.Tab("A subject, from images", id="subject"):
            subject_tab(studio)
        with gr.Tab("A task, from questions about images", id="instruct"):
            task_tab(studio)


def subject_tab(studio: Studio) -> None:
    """Images, settings, start."""
    form = Form("subject", SUBJECT, hidden=("out", "images"))
    gr.Markdown("## 1. Images")
    photos = PhotoStep(studio)
    gr.Markdown("## 2. Settings")
    with gr.Row():
        presets = [gr.Button(name, size="sm", elem_id=f"preset-{name.split()[0].lower()}") for name in STEPS]
    form.build_basic()
    form.build_rest()
    form.build_yaml()
    gr.Markdown("## 3. Start")
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="run-1", elem_id="run-name")
        ask = gr.Button("Estimate time and memory", elem_id="plan")
        begin = gr.Button("Start", variant="primary", elem_id="start")
    taken = gr.HTML(label="Estimate", elem_id="estimate")
    started = gr.HTML(label="Started", elem_id="started")

    def take_preset(name: str) -> Any:
        @show_errors
        def take(*boxes: Any) -> tuple[Any, ...]:
            config: Any = form.config(form.boxes_yaml(*boxes))
            new = values_to_yaml(form.method, config_values(config) | preset(name, config.base))
            return new, *form.from_yaml(new), (name, config.base)

        return take

    @show_errors
    def follow_base(applied: tuple[str, str], *boxes: Any) -> tuple[Any, ...]:
        config: Any = form.config(form.boxes_yaml(*boxes))
        new = values_to_yaml(form.method, with_base_preset(config_values(config), applied, config.base))
        return new, *form.from_yaml(new), (applied[0], config.base)

    @show_errors
    def save_edited(folder: str, table: Any) -> Any:
        return photos.save_edited(folder, table)

    @show_errors
    def estimate_run(folder: str, text: str) -> str:
        config = check_paths(form.config(text), studio.paths, studio.paths.free_name("estimate"))
        return estimate(replace(config, images=Path(folder) if folder else None))  # type: ignore[type-var]

    @show_errors
    def begin_run(folder: str, text: str, name: str) -> tuple[str, str]:
        if not folder:
            raise UserError("There are no images yet: add some in step 1.")
        config: Any = replace(form.config(text), images=Path(folder))  # type: ignore[type-var]
        return enqueue_run(studio, check_paths(config, studio.paths, name))

    @show_errors
    def clone_run(request: gr.Request) -> tuple[Any, ...]:
        return initial_settings(studio.paths, form, request.query_params.get("clone"))

    form.wire(elsewhere=("base",))
    photos.wire(form)
    applied = gr.State((STANDARD, "tiny"))  # the preset that was taken last, and its base
    filled = [form.yaml, form.command, form.message, form.written, *form.boxes]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    for button, wish in zip(presets, STEPS, strict=True):
        button.click(take_preset(wish), form.boxes, [*filled, applied], **private)
    form.widgets["base"].input(follow_base, [applied, *form.boxes], [*filled, applied], **private)
    settle = (show_errors(form.settle), [form.written, form.yaml, *form.boxes], form.sides)
    ask.click(*settle, **private).success(estimate_run, [photos.folder, form.yaml], taken, api_name="plan")
    begin.click(*settle, **private).success(
        save_edited, [photos.folder, photos.captions], photos.message, **private
    ).success(begin_run, [photos.folder, form.yaml, name], [started, name], api_name="start")
    page = gr.context.Context.root_block
    page.load(clone_run, None, [*photos.outputs, *filled, name], api_visibility="private", show_progress="hidden")


def initial_settings(paths: StudioPaths, form: Form, name: str | None) -> tuple[Any, ...]:
    """Images, settings and a free name: those of a run, or those to begin with.

    Raises:
        UserError: for a run that is none on a subject.
    """
    if not name:
        text = values_to_yaml(form.method, preset(STANDARD, "tiny"))
        return (*(gr.skip() for _ in range(4)), text, *form.from_yaml(text), paths.free_name("run-1"))
    config = paths.config(name)
    if not isinstance(config, SubjectConfig) or config.images is None:
        raise UserError(f"{name} is not a run on a subject: only their settings can be used here.")
    text = values_to_yaml(
        form.method, {key: value for key, value in config_values(config).items() if key not in ("out", "images")}
    )
    return (*folder_outputs(config.images, []), text, *form.from_yaml(text), paths.free_name(name))


def estimate(config: Any) -> str:
    """Memory, numbers, disk and time that a run will take, and advice."""
    from ....training.launch.plan import advice, disk_bytes, min_seconds, plan

    found = plan(config)
    lines = [
        f"Memory at the peak: {found.peak / 2**30:.2f} GiB (the base {found.base / 2**30:.2f}, the adapter "
        f"{found.adapter / 2**30:.3f}, the step {found.working / 2**30:.2f}).",
        f"{found.parameters:,} trainable parameters; {disk_bytes(found) / 2**20:.0f} MiB on the disk.",
        f"At least {format_duration(min_seconds(found))} for {config.steps} steps.",
        *advice(found),
    ]
    return "".join(map(message_html, lines))


def task_tab(studio: Studio) -> None:
    """A vision-language model: data, settings, start."""
    places, form = studio.paths, Form("instruct", TASK)

    @show_errors
    def begin_task(text: str, name: str) -> tuple[str, str]:
        config = check_paths(form.config(text), places, name)
        check_media(config, places)
        return enqueue_run(studio, config)

    form.build_basic()
    form.build_rest()
    form.build_yaml()
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="task-1", elem_id="task-name")
        begin = gr.Button("Start", variant="primary", elem_id="start-task")
    started = gr.HTML(label="Started", elem_id="task-started")
    form.wire()
    begin.click(
        show_errors(form.settle),
        [form.written, form.yaml, *form.boxes],
        form.sides,
        api_visibility="private",
        show_progress="hidden",
    ).success(begin_task, [form.yaml, name], [started, name], api_name="start_task")
