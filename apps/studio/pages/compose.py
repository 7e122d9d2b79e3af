"""Compose: one adapter of several, by equal, given or learned weights; and what a composed run was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ....toolkit.core.errors import UserError, list_names
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.adapter_facts import AdapterFacts, read_facts
from ....toolkit.formats.locate import adapter_facts, adapter_path
from ....training.compose.checks import check_compose
from ....training.config.checks import check_ranges
from ....training.config.compose import ComposeConfig
from ....training.runs import library
from ..backend.context import Studio
from ..backend.housekeeping import image_sets
from ..backend.numbers import whole
from ..backend.paths import StudioPaths, to_slug
from ..backend.submit import enqueue_run
from ..render.messages import message_html, show_errors
from ..widgets.actions import act
from ..widgets.compose_preview import ComposePreview
from ..widgets.filling import fill_on_load, keep_draft, suggest_next

EQUAL, CUSTOM, LEARNED = "Equal", "Custom weights", "Learn from images"
FIRST = "composed-1"  # the name of a first run
VALUES = ("weights", "set", "folder", "steps", "rate", "rank", "base", "token", "noun")  # boxes of step 2
TABLE = ["adapter", "mean weight", "least", "greatest"]


# ---------------------------------------------------------------------------------------------- what is asked for


def source_path(paths: StudioPaths, name: str) -> str:
    """What a config calls an adapter: a run's folder where it is a run's own, whose name the composition then bears.

    Raises:
        UserError: when there is no such adapter.
    """
    path = paths.adapter(name)
    return str(path.parent if adapter_path(path.parent) == path else path)


def source_facts(paths: StudioPaths, name: str) -> AdapterFacts:
    """What an adapter says of itself; for a file in the library, which says little, what the library knows."""
    path = paths.adapter(name)
    facts, entry = adapter_facts(path), library.read_entry(path.parent)
    return facts if facts.base or entry is None else replace(facts, base=entry.base)


def collision_note(paths: StudioPaths, names: list[str] | None) -> str:
    """That adapters of different subjects share a trigger word, so that it will call a mixture of them."""
    by_word: dict[str, list[str]] = {}
    for name in names or ():
        if word := source_facts(paths, name).token:
            by_word.setdefault(word, []).append(name)
    shared = {word: own for word, own in by_word.items() if len(own) > 1}
    return "".join(
        message_html(
            f"{list_names(own)} share the trigger word {word}: it will call a mixture of what they learned.", "loud"
        )
        for word, own in shared.items()
    )


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """The numbers in a box, one for each adapter.

    Raises:
        UserError: for anything else.
    """
    try:
        weights = tuple(float(word) for word in text.replace(",", " ").replace(";", " ").split())
    except ValueError as error:
        raise UserError(
            f"The weights {text!r} are not numbers: write one for each adapter, such as 0.6 0.4."
        ) from error
    if len(weights) != count:
        raise UserError(f"There are {len(weights)} weights for {count} adapters: write one for each, such as 0.6 0.4.")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"The weights {text!r} are not all finite: write plain numbers, such as 0.6 0.4.")
    return weights


def resolve_images(paths: StudioPaths, chosen: str | None, typed: str) -> Path:
    """The folder that weights are learned on: an uploaded set, or one that somebody typed.

    Raises:
        UserError: when it is neither, both, or may not be read.
    """
    if chosen and typed.strip():
        raise UserError("An uploaded set and a folder were both given: leave one of them empty.")
    if typed.strip():
        return paths.readable_folder(typed, "The folder")
    if not chosen:
        raise UserError("Learned weights need a few images: choose an uploaded set, or type a folder.")
    if chosen not in image_sets(paths):
        raise UserError(f"There is no set of images named {chosen}: choose one from the list.")
    return paths.upload_folder(chosen)


def parse_config(
    paths: StudioPaths, names: list[str] | None, how: str, values: dict[str, Any], run: str
) -> ComposeConfig:
    """The config that the boxes mean. values: weights, set, folder, steps, rate, rank, base, token and noun, as boxes have them.

    Raises:
        UserError: for no adapters, one that is not there, and numbers or paths that do not fit.
    """
    if not names:
        raise UserError("No adapter has been chosen: choose those that one shall be made of.")
    if how not in (EQUAL, CUSTOM, LEARNED):
        raise UserError(f"{how!r} is not a way to compose: choose {EQUAL}, {CUSTOM} or {LEARNED}.")
    first = source_facts(paths, names[0])
    base = values["base"] or first.base
    if not base:
        raise UserError(f"{names[0]} does not say which base it was made for: choose the base.")
    checked = paths.base(base)
    settings: dict[str, Any] = {}
    if how == CUSTOM:
        settings["weights"] = parse_weights(values["weights"] or "", len(names))
    if how == LEARNED:
        settings["images"] = resolve_images(paths, values["set"], values["folder"] or "")
        settings |= {"steps": whole("Steps", values["steps"]), "learning_rate": float(values["rate"] or 0)}
    for key, own, said in (("token", values["token"], first.token), ("class_noun", values["noun"], first.class_noun)):
        if words := (own or "").strip() or said:
            settings[key] = words
    return ComposeConfig(
        out=paths.new_run(run),
        adapters=tuple(source_path(paths, name) for name in names),
        # An adapter's own spelling of its base stays, for the others' are compared with it.
        base=checked if values["base"] else base,
        max_rank=whole("Limit rank", values["rank"]),
        **settings,
    )


# ---------------------------------------------------------------------------------------------- what came of it


def composed_runs(paths: StudioPaths) -> list[str]:
    """Runs whose adapter was made of others, the newest first."""
    return [name for name in paths.run_names() if read_own_facts(paths.run(name).adapter).composed_of]


def read_own_facts(folder: Path) -> AdapterFacts:
    """What an adapter's folder says of itself; nothing where that is damaged."""
    try:
        return read_facts(folder)
    except UserError:
        return AdapterFacts()


def describe_composition(paths: StudioPaths, name: str) -> tuple[list[list[Any]], list[str]]:
    """A row for each source, see TABLE, and sentences about the whole.

    Raises:
        UserError: when there is no such run, or it was not composed, or not yet.
    """
    run, facts = paths.run(name), read_own_facts(paths.run(name).adapter)
    if not facts.composed_of:
        if isinstance(paths.config(name), ComposeConfig):
            raise UserError(f"{name} is {run.state() or 'no run'}: its weights are here when it is done, see Watch.")
        raise UserError(f"{name} was not composed: choose a run of this page.")
    weights = facts.composed_weights
    columns = list(zip(*weights.values(), strict=True))
    names = source_names(paths, name, [source.name for source in facts.composed_of])
    rows = [
        [source, *(round(value, 4) for value in (sum(own) / len(own), min(own), max(own)))]
        for source, own in zip(names, columns, strict=True)
    ]
    lines = [f"{facts.composed_how} of {len(rows)} adapters for the base {facts.base}."]
    if len(weights) > 1:
        lines.append(f"The weights were learned, {len(weights)} sets of them: one for each place in the model.")
    if facts.composed_cut_error:
        lines.append(f"It was cut to a lower rank: a layer's change is missed by up to {facts.composed_cut_error:.1%}.")
    return rows, lines


def source_names(paths: StudioPaths, run: str, known: list[str]) -> list[str]:
    """What pages call the sources of a composed run; where one is gone, what it was called."""
    config = paths.config(run)
    source_paths = config.adapters if isinstance(config, ComposeConfig) else ()
    if len(source_paths) != len(known):
        return known
    names = []
    for path, name in zip(source_paths, known, strict=True):
        try:
            names.append(paths.adapter_name(path))
        except UserError:
            names.append(name)
    return names


# ---------------------------------------------------------------------------------------------- the page


def build(studio: Studio) -> None:
    """The page."""
    gr.Markdown("## 1. Adapters")
    names = gr.Dropdown(
        [],
        multiselect=True,
        allow_custom_value=True,
        label="Adapters, all for the same base",
        elem_id="compose-adapters",
    )
    gr.Markdown("## 2. How much of each")
    boxes = [names, *weighting_inputs()]
    preview = ComposePreview(studio)
    gr.Markdown("## 3. Start")
    with gr.Row():
        run = gr.Textbox(label="Name of the run", value=FIRST, elem_id="compose-name")
        go = gr.Button("Compose", variant="primary", elem_id="compose-start")
    started = gr.HTML(label="Started", elem_id="compose-started")
    gr.Markdown("## What a composed run was made of")
    with gr.Row():
        done = gr.Dropdown([], allow_custom_value=True, label="Composed run", scale=3, elem_id="composed-run")
        again = gr.Button("Refresh", scale=1)
    said = gr.HTML(label="How it was made", elem_id="composed-said")
    table = gr.Dataframe(
        headers=TABLE, label="What it was made of", interactive=False, wrap=True, elem_id="composed-of"
    )
    wire_events(studio, boxes, run, go, started, done, again, said, table)
    wire_preview(studio, preview, boxes)


def wire_preview(studio: Studio, preview: ComposePreview, boxes: list[Any]) -> None:
    """What the preview's button does."""

    def draw_preview(names: list[str] | None, how: str, *values: Any) -> Iterator[Any]:
        *settings, prompt, seed = values
        free = studio.paths.free_name(FIRST)
        config = parse_config(studio.paths, names, how, dict(zip(VALUES, settings, strict=True)), free)
        check_compose(config)
        yield from preview.draw(config, names or [], prompt, seed)

    act(
        preview.go, draw_preview, [*boxes, preview.prompt, preview.seed], [preview.said, preview.image], preview.said,
        concurrency_limit=None,
    )  # fmt: skip


def weighting_inputs() -> list[Any]:
    """The boxes of step 2, in the order that `compose` takes them; those of the way that was not chosen are hidden."""
    how = gr.Radio([EQUAL, CUSTOM, LEARNED], value=EQUAL, label="Weights of the adapters", elem_id="compose-how")
    weights = gr.Textbox(
        label="Weights, one for each adapter", placeholder="0.6 0.4", visible=False, elem_id="compose-weights",
        info="Any numbers; 1 takes an adapter as it was trained.",
    )  # fmt: skip
    with gr.Group(visible=False) as learned:
        with gr.Row():
            chosen = gr.Dropdown(
                [], allow_custom_value=True, label="Images: an uploaded set (see Train)", elem_id="compose-set"
            )
            folder = gr.Textbox(
                label="Or a folder on this machine", placeholder="/home/me/photos/cat", elem_id="compose-folder"
            )
        with gr.Row():
            steps = gr.Number(100, label="Steps", elem_id="compose-steps")
            rate = gr.Number(0.05, label="Learning rate of the weights", elem_id="compose-rate")
    with gr.Row():
        rank = gr.Number(
            0, label="Limit rank (0 = keep all)", elem_id="compose-rank",
            info="Without a cut the sum is exact and has the sum of the ranks.",
        )  # fmt: skip
        base = gr.Dropdown(
            ["", *EMBEDDED], value="", allow_custom_value=True, label="Base model", elem_id="compose-base",
            info="Empty: the one that the first adapter was made for.",
        )  # fmt: skip
        token = gr.Textbox(label="Trigger word", info="Empty: the first adapter's.", elem_id="compose-token")
        noun = gr.Textbox(
            label="What it is (dog, person, mug ...)", info="Empty: the first adapter's.", elem_id="compose-noun"
        )
    how.change(
        lambda way: (gr.update(visible=way == CUSTOM), gr.update(visible=way == LEARNED)), how, [weights, learned],
        api_visibility="private", queue=False, show_progress="hidden",
    )  # fmt: skip
    return [how, weights, chosen, folder, steps, rate, rank, base, token, noun]


def wire_events(studio: Studio, boxes: list[Any], run: Any, go: Any, started: Any, done: Any, again: Any, said: Any,
         table: Any) -> None:  # fmt: skip
    """What the buttons do."""
    places = studio.paths

    def compose(names: list[str] | None, how: str, weights: str, chosen: str | None, folder: str, steps: float,
                rate: float, rank: float, base: str, token: str, noun: str, name: str) -> tuple[str, str]:  # fmt: skip
        given = (weights, chosen, folder, steps, rate, rank, base, token, noun)
        config = parse_config(places, names, how, dict(zip(VALUES, given, strict=True)), to_slug(name))
        check_ranges(config)
        check_compose(config)  # the queue does so only for weights that are learned
        return enqueue_run(studio, config)

    def compose_shown(*shown: Any) -> tuple[Any, ...]:
        link, free = compose(*shown)
        return link, [shown[-1], free]

    def show_composition(name: str | None) -> tuple[str, list[list[Any]]]:
        if not name:
            return message_html("No run has been composed yet."), []
        rows, lines = describe_composition(places, name)
        return "".join(map(message_html, lines)), rows

    def load_page(request: gr.Request) -> tuple[Any, ...]:
        runs, wanted = composed_runs(places), request.query_params.get("run")
        value = wanted if wanted in runs else (runs[0] if runs else None)
        return (
            gr.update(choices=list(places.adapters())),
            gr.update(choices=["", *image_sets(places)]),
            places.free_name(FIRST),
            gr.update(choices=runs, value=value),
            *show_composition(value),
        )

    def refresh_runs(chosen: str | None) -> tuple[Any, ...]:
        runs = composed_runs(places)
        value = chosen if chosen in runs else (runs[0] if runs else None)
        return (
            gr.Dropdown(choices=runs, value=value),
            *show_composition(value),
            gr.Dropdown(choices=list(places.adapters())),
        )

    names, chosen, upcoming = boxes[0], boxes[3], gr.JSON(visible=False, label="Values that a page fills in")
    given = [*boxes, run]
    suggest_next(act(go, compose_shown, given, [started, upcoming], started), upcoming, run)
    gr.on([], show_errors(compose), given, [started, run], api_name="compose")
    act(done.input, show_composition, done, [said, table], said)
    act(again, refresh_runs, done, [done, said, table, names], said)
    keep_draft("compose", boxes)
    fill_on_load(load_page, None, [names, chosen, run, done], [said, table])
    act(names.input, lambda wanted: collision_note(places, wanted), names, [started], started)
