"""The tab for subjects of the Train page: images, what they show and what learns it, start."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError
from ....toolkit.data.subjects import find_samples
from ....training.config.base import LoopConfig
from ....training.config.subject import SubjectConfig
from ....training.subject.summary import base_warnings
from ..backend.bases import CARDS, describe_base, known_bases, memory_gib
from ..backend.context import Studio
from ..backend.measured import measured_step
from ..backend.paths import StudioPaths, check_name, to_slug
from ..backend.presets import STANDARD, STEPS, preset, with_base_preset
from ..backend.run_paths import check_paths
from ..backend.submit import enqueue_run
from ..backend.turns import calling_client
from ..render.messages import format_duration, message_html, name_settings, show_errors
from .actions import act, beside
from .fields import config_values, values_to_yaml
from .filling import fill_on_load, suggest_next
from .form import External, Form, run_name_box
from .photos import PhotoStep
from .reference_sets import ReferenceSets

FIRST = "run-1"  # the name of a first run
SUBJECT = ("class_noun", "token", "base", "steps")


def subject_tab(studio: Studio) -> None:
    """Images, what they show, start."""
    page = SubjectPage(studio)
    gr.Markdown("## 1. Images")
    page.photos = PhotoStep(studio)
    page.references = ReferenceSets(studio.paths)
    gr.Markdown("## 2. What it is, and what learns it")
    page.build_settings()
    gr.Markdown("## 3. Start")
    page.build_start()
    page.wire()


class SubjectPage:
    """The tab for subjects."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths = studio, studio.paths
        self.form = Form("subject", SUBJECT, ("out", "images", "references"), preset(STANDARD, "tiny"))
        self.photos: Any = None
        self.references: Any = None

    # -------------------------------------------------------------------------- building

    def build_settings(self) -> None:
        """The essentials, then everything else, folded."""
        self.cards = gr.Radio(
            [(describe_base(card, math.inf), card.name) for card in CARDS], value="tiny", label="Base model",
            elem_id="base-cards", elem_classes=["choices", "bases"],
            info="Others: a hub id, a folder or a checkpoint, in the box below.",
        )  # fmt: skip
        self.form.build_basic()
        with gr.Row():
            self.presets = [gr.Button(name, size="sm", elem_id=f"preset-{name.split()[0].lower()}") for name in STEPS]
        self.warning = gr.HTML(label="Images and base", elem_id="base-warning")
        self.form.build_rest()

    def build_start(self) -> None:
        """The run's name, what it will take, and the button."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=200):
                self.name = run_name_box(self.form, self.paths, FIRST, "run-name")
            with gr.Column(scale=1, min_width=200):
                self.ask = gr.Button("Estimate time and memory", elem_id="plan")
                self.begin = gr.Button("Start", variant="primary", size="lg", elem_id="start")
        self.started = gr.HTML(label="Started", elem_id="started")
        self.taken = gr.HTML(label="Estimate", elem_id="estimate")
        self.form.external["images"] = External(
            self.photos.folder, lambda folder: folder or None, lambda path: path or ""
        )
        self.form.external["references"] = self.references.external
        self.form.build_yaml()

    # -------------------------------------------------------------------------- wiring

    def wire(self) -> None:
        """What happens."""
        form, photos = self.form, self.photos
        form.wire(elsewhere=("base",))
        photos.wire(form)
        self.references.wire(photos.folder)
        self.applied = gr.State((STANDARD, "tiny"))  # the preset that was taken last, and its base
        self.filled = [form.yaml, form.command, form.message, form.written, *form.boxes]
        self.draft = gr.BrowserState("", storage_key="rankfold-subject", secret="rankfold")
        self.kept_folder = gr.State("")  # of the images that a loaded page brings back
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for button, wish in zip(self.presets, STEPS, strict=True):
            act(button, self.take_preset(wish), form.boxes, [*self.filled, self.applied], form.message)
        base = form.widgets["base"]
        act(
            base.input,
            self.follow_base,
            [self.applied, *form.boxes],
            [*self.filled, self.applied, self.cards],
            form.message,
        )
        act(
            self.cards.input, self.choose_card, [self.cards, self.applied, *form.boxes],
            [*self.filled, self.applied, self.cards], form.message,
        )  # fmt: skip
        warned = [photos.folder, base]
        gr.on([photos.folder.change, base.change], show_errors(self.warn), warned, self.warning, queue=False, **quiet)
        sides = [form.written, form.yaml, *form.boxes]
        act(self.ask, self.estimate_shown, sides, [*form.sides, self.taken], self.taken, concurrency_limit=None)
        names = gr.JSON(visible=False, label="Values that a page fills in")
        event = act(
            self.begin, self.start_shown, [photos.folder, photos.captions, *sides], [*form.sides, self.started, names], self.started
        )  # fmt: skip
        suggest_next(event, names, self.name)
        # The same for programs, by the YAML alone.
        gr.on([], show_errors(self.estimate_run), [photos.folder, form.yaml], self.taken, api_name="plan")
        gr.on(
            [],
            show_errors(self.begin_run),
            [photos.folder, form.yaml, self.name],
            [self.started, self.name],
            api_name="start",
        )
        form.yaml.change(None, form.yaml, self.draft, js="(text) => [text]", **quiet)
        self.wire_loading(sides, warned)
        form.yaml.blur(
            beside(lambda folder: photos.show_folder(folder)[1:], 2, 3), photos.folder, photos.outputs[1:], **quiet
        )

    def wire_loading(self, sides: list[Any], warned: list[Any]) -> None:
        """What was on the page last; then the texts, which follow the boxes; then what takes its time."""
        form, photos, quiet = self.form, self.photos, {"api_visibility": "private", "show_progress": "hidden"}
        boxes = [self.cards, form.options, *form.widgets.values(), self.references.chosen, self.name]
        event = fill_on_load(self.load, self.draft, boxes, [self.kept_folder, self.started], self.started)
        photos.show_kept(event, self.kept_folder).then(
            beside(form.settle, 2, 4), sides, form.sides, queue=False, **quiet
        ).then(
            show_errors(self.base_choices), None, self.cards, queue=False, **quiet
        ).then(show_errors(self.warn), warned, self.warning, queue=False, **quiet)  # fmt: skip

    # -------------------------------------------------------------------------- what the events do

    def take_preset(self, name: str) -> Any:
        """What a preset's button does."""

        def take(*boxes: Any) -> tuple[Any, ...]:
            config: Any = self.form.config(self.form.boxes_yaml(*boxes))
            new = values_to_yaml(self.form.method, config_values(config) | preset(name, config.base))
            return new, *self.form.from_yaml(new), (name, config.base)

        return take

    def follow_base(self, applied: tuple[str, str], *boxes: Any) -> tuple[Any, ...]:
        """Another base: the preset's settings for it, but for what was set."""
        config: Any = self.form.config(self.form.boxes_yaml(*boxes))
        new = values_to_yaml(self.form.method, with_base_preset(config_values(config), applied, config.base))
        return new, *self.form.from_yaml(new), (applied[0], config.base), self.base_cards(config.base)

    def choose_card(self, name: str, applied: tuple[str, str], *boxes: Any) -> tuple[Any, ...]:
        """The base of a card."""
        place = 1 + list(self.form.widgets).index("base")
        return self.follow_base(applied, *boxes[:place], name, *boxes[place + 1 :])

    def base_cards(self, base: str) -> Any:
        """The cards, with the base's own chosen."""
        return gr.Radio(choices=self.base_choices()["choices"], value=chosen_card(base))

    def base_choices(self) -> dict[str, Any]:
        """The cards as they are now: what is here, and what fits into the memory that is free."""
        free = memory_gib()
        return gr.update(choices=[(describe_base(card, free), card.name) for card in known_bases()])

    def warn(self, folder: str, base: str) -> str:
        """That an embedded base does not know photos, where there are photos."""
        if not folder:
            return ""
        try:
            found = find_samples(self.paths.readable_folder(folder, "The folder"), skip_bad=True)
        except UserError:
            return ""
        config = SubjectConfig(base=base or "", images=Path(folder))
        return "".join(message_html(name_settings(line), "loud") for line in base_warnings(config, found))

    def estimate_shown(self, written: Any, text: str, *boxes: Any) -> tuple[Any, ...]:
        """What the run on the page will take."""
        settled = self.form.settle(written, text, *boxes)
        config: Any = self.form.config(settled[0])
        return *settled, self.estimate_run(str(config.images or ""), settled[0])

    def estimate_run(self, folder: str, text: str) -> str:
        """What a run will take."""
        config = check_paths(self.form.config(text), self.paths, self.paths.free_name("estimate"))
        with self.studio.planning.wait(calling_client()):
            return estimate(replace(config, images=Path(folder) if folder else None), self.paths)  # type: ignore[type-var]

    def start_shown(self, folder: str, table: Any, written: Any, text: str, *boxes: Any) -> tuple[Any, ...]:
        """Starts the run on the page, with the captions as they are shown. Gives its name, as it was typed, and the next, too."""
        settled = self.form.settle(written, text, *boxes)
        config: Any = self.form.config(settled[0])
        said = self.photos.save_edited(folder, table) if str(config.images or "") == folder else ""
        link, free = self.begin_run(str(config.images or ""), settled[0], config.out.name)
        return *settled, said + link, [boxes[1 + len(self.form.widgets)], free]

    def begin_run(self, folder: str, text: str, name: str) -> tuple[str, str]:
        """Starts a run."""
        if not folder:
            raise UserError("There are no images yet: add some in step 1.")
        config: Any = replace(self.form.config(text), images=Path(folder))  # type: ignore[type-var]
        return enqueue_run(self.studio, check_paths(config, self.paths, to_slug(name)))

    def load(self, draft: str | None, request: gr.Request) -> tuple[Any, ...]:
        """For the boxes: the settings of the run that the page's address names, or that were on the page last, or only a free name."""
        name = request.query_params.get("clone")
        kept = cloned_settings(self.paths, self.form, name) if name else self.restored_settings(draft)
        if not kept:  # the boxes are as they were built
            leave = [gr.skip()] * (3 + len(self.form.widgets))
            return *leave, self.paths.free_name(FIRST), "", gr.skip()
        config: Any = self.form.config(kept)
        options, *boxes = self.form.from_yaml(kept)[3 : 4 + len(self.form.widgets)]
        filled = (
            chosen_card(config.base),
            options,
            *boxes,
            [str(folder) for folder in config.references],
            config.out.name,
        )
        return *filled, str(config.images or ""), gr.skip()

    def restored_settings(self, draft: str | None) -> str:
        """What was on the page last, for another run, as far as it can be read; '' for nothing."""
        try:
            config: Any = self.form.config(draft or "")
            if config.images is not None:
                self.paths.readable_folder(str(config.images), "The folder")
            for folder in config.references:
                self.paths.readable_folder(str(folder), "The folder of references")
        except UserError:
            return ""
        return settings_for(self.form, self.paths, config, config.out.name) if draft else ""


def chosen_card(base: str) -> str | None:
    """The card of a base."""
    return base if base in {card.name for card in known_bases()} else None


def settings_for(form: Form, paths: StudioPaths, config: LoopConfig, name: str) -> str:
    """A config's settings for another run, named so where that is free."""
    own = {"out": str(paths.runs / paths.free_name(check_name(to_slug(name), "run")))}
    return values_to_yaml(form.method, config_values(config) | own)


def cloned_settings(paths: StudioPaths, form: Form, name: str) -> str:
    """The settings of a run, for another.

    Raises:
        UserError: for a run that is none on a subject, or whose images are gone.
    """
    config = paths.config(name)
    if not isinstance(config, SubjectConfig) or config.images is None:
        raise UserError(f"{name} is not a run on a subject: only their settings can be used here.")
    if not config.images.is_dir():
        raise UserError(f"The images of {name} are no longer there: add them again, in step 1.")
    if gone := next((folder for folder in config.references if not folder.is_dir()), None):
        raise UserError(f"The references of {name} in {gone} are no longer there: add them again, in step 1.")
    return settings_for(form, paths, config, name)


def estimate(config: Any, paths: StudioPaths) -> str:
    """Memory, numbers, disk and time that a run will take, and advice."""
    from ....training.launch.plan import advice, disk_bytes, min_seconds, plan

    found = plan(config)
    lines = [
        f"Memory at the peak: {found.peak / 2**30:.2f} GiB (the base {found.base / 2**30:.2f}, the adapter "
        f"{found.adapter / 2**30:.3f}, the step {found.working / 2**30:.2f}).",
        f"{found.parameters:,} trainable parameters; {disk_bytes(found) / 2**20:.0f} MiB on the disk.",
    ]
    if measured := measured_step(paths, found.config):
        seconds, run = measured
        lines.append(
            f"About {format_duration(seconds * config.steps)} for {config.steps} steps, at {seconds:.2g} s a step as measured in "
            f"{run}, plus loading and previews."
        )
    else:
        lines.append(
            f"At least {format_duration(min_seconds(found))} for {config.steps} steps; no run like it was measured here."
        )
    return "".join(map(message_html, [*lines, *advice(found)]))
