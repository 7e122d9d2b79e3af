"""Library: all adapters at a glance, runs' adapters kept under a name, what is inside a file, and files for other tools."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ....pipelines.chat import open_chat
from ....pipelines.export import export_adapter
from ....pipelines.export_chat import export_chat
from ....pipelines.generate import Recipe, load_pipeline
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.adapter_facts import AdapterFacts
from ....toolkit.formats.adapter_folder import is_native
from ....toolkit.formats.folder_report import inspect_adapter
from ....toolkit.formats.locate import adapter_facts
from ....toolkit.formats.report import Report
from ....toolkit.formats.write import FORMATS
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.images import DiffusionConfig
from ....training.runs import library
from ..backend.context import Studio
from ..backend.paths import StudioPaths, check_name
from ..render.messages import message_html, show_errors

TABLE = ["name", "where", "base", "trigger", "kind"]
FACTS = ["Property", "Value"]
LAYERS = ["layer", "method", "rank", "scale", "size of the change", "over the weight", "fault"]
EXPORTS_FOLDER = "_exports"  # in the runs' folder: what was exported
FORMAT_LABELS = {
    "diffusers": "diffusers: load_lora_weights",
    "peft": "peft: PeftModel.from_pretrained (a zip)",
    "kohya": "kohya: A1111, ComfyUI, kohya's tools",
    "kohya-full": "kohya-full: whole weight changes",
    "kohya-glora": "kohya-glora: GLoRA's own factors",
}
Rows = list[list[Any]]


# ---------------------------------------------------------------------------------------------- all adapters


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter, and where it comes from."""

    name: str
    """What pages call it."""
    path: Path
    run: str | None
    """The run that made it; None for one of the library."""
    is_chat: bool
    """Whether it is one of a vision-language model."""
    facts: AdapterFacts
    """What it says of itself; of one of the library, with what was said when it was added."""
    trigger: str
    """Trigger words of the subject."""


def list_adapters(paths: StudioPaths) -> dict[str, AdapterEntry]:
    """All adapters by what pages call them, the runs' first."""
    found = {}
    for is_chat in (False, True):
        for name, path in paths.adapters(chat=is_chat).items():
            kept = path.is_relative_to(library.library_folder())
            run = None if kept else path.relative_to(paths.runs).parts[0]
            facts = read_own_facts(path)
            entry = library.read_entry(path.parent) if kept else None
            if entry is not None:
                facts = replace(facts, base=entry.base, adapter=entry.adapter or facts.adapter)
            words = (entry.trigger if entry is not None else "") or facts.trigger_words
            found[name] = AdapterEntry(name, path, run, is_chat, facts, words)
    return found


def read_own_facts(path: Path) -> AdapterFacts:
    """What an adapter says of itself; nothing while it is being written, or when it is corrupted."""
    try:
        return adapter_facts(path)
    except UserError:
        return AdapterFacts()


def find_adapter(paths: StudioPaths, name: str | None) -> AdapterEntry:
    """The adapter that pages call so.

    Raises:
        UserError: when none was chosen, or there is no such one.
    """
    if not name:
        raise UserError("No adapter has been chosen: choose one from the list.")
    found = list_adapters(paths)
    if name not in found:
        raise UserError(f"There is no adapter named {name}: choose one from the list.")
    return found[name]


def table_row(one: AdapterEntry) -> list[str]:
    """Its row of TABLE."""
    facts = one.facts
    kind = facts.adapter or "lora"
    if facts.composed_of:
        kind += f", composed of {len(facts.composed_of)}"
    return [one.name, "library" if one.run is None else "runs", facts.base or "-", one.trigger or "-", kind]


def library_thumbnails() -> list[tuple[Image.Image, str]]:
    """The library's images, with the adapters' names."""
    found = []
    for entry in library.entries():
        if entry.thumbnail:
            with Image.open(entry.thumbnail) as image:
                # Not the path: the library may lie in a hidden folder, of which Gradio shows nothing.
                found.append((image.convert("RGB"), entry.name))
    return found


def add_to_library(paths: StudioPaths, adapter: str | None, name: str, trigger: str) -> str:
    """Copies a run's adapter into the library; returns a sentence.

    Raises:
        UserError: for an adapter that is not a run's, or a name that is none or is taken.
    """
    one = find_adapter(paths, adapter)
    if one.run is None or one.is_chat:
        raise UserError(f"{one.name} is not a run's adapter of a diffusion model: choose one from the list.")
    check_name(name, "library's adapter")
    if any(entry.name == name for entry in library.entries()):
        raise UserError(f"The library has an adapter named {name} already: choose another name.")
    run = paths.run(one.run)
    made = one.path == run.adapter
    image = library.newest_preview(run.folder)
    entry = library.add(run.folder if made else one.path, name=name, trigger=trigger.strip(), thumbnail=image)
    return f"{entry.name} is in the library (base {entry.base}, trigger {entry.trigger or '-'})."


# ---------------------------------------------------------------------------------------------- inspect


def inspect_source(
    paths: StudioPaths, name: str | None, file: str | None, against_base: bool
) -> tuple[Rows, Rows, list[str]]:
    """Facts, a row for each layer, and what to do about it: of a file that was uploaded, or of an adapter.

    against_base: each layer's change is set against the weight that it changes.

    Raises:
        UserError: when neither was given, or what was given is not an adapter.
    """
    if file:
        if against_base:
            raise UserError(
                "A file is read without its base: clear the comparison with the base, or add it to the library."
            )
        try:
            return report_tables(inspect_adapter(Path(file)))
        except UserError as error:  # where it was uploaded to helps nobody
            raise UserError(str(error).replace(file, Path(file).name)) from error
    one = find_adapter(paths, name)
    model: Any = None
    if against_base:
        base = require_base(paths, one)
        model = open_chat(base) if one.is_chat else load_pipeline(Recipe(prompt="", base=base))
    return report_tables(inspect_adapter(one.path, model))


def require_base(paths: StudioPaths, one: AdapterEntry) -> str:
    """The base that an adapter was made for.

    Raises:
        UserError: when it does not say, or the base may not be read.
    """
    base = one.facts.base
    if not base:
        raise UserError(f"{one.name} does not say which base it was made for, so nothing can be set against it.")
    paths.base(base, tuple(EMBEDDED_VISION if one.is_chat else EMBEDDED))
    return base


def report_tables(found: Report) -> tuple[Rows, Rows, list[str]]:
    """What was found, as the page's tables have it."""
    layers = [
        [one.name, one.method, one.rank, one.scale, format_number(one.norm), format_percent(one.relative), one.fault]
        for one in found.layers
    ]
    return [["name", found.path.name], *map(list, found.table())], layers, found.summary()


def format_number(value: float | None) -> str:
    """A size."""
    return "-" if value is None else f"{value:.4g}"


def format_percent(value: float | None) -> str:
    """A part of the whole."""
    return "" if value is None else f"{value:.2%}"


# ---------------------------------------------------------------------------------------------- export


def export_files(
    paths: StudioPaths, name: str | None, format: str, *, approximate: bool, max_error: float, drop_bias: bool
) -> tuple[list[str], list[str]]:
    """Writes an adapter for other tools below the runs' folder; returns the proof's sentences and the files.

    Raises:
        UserError: for an unknown adapter or format, one that the format cannot say, and a file that proves to be wrong.
    """
    one = find_adapter(paths, name)
    if format not in FORMATS:
        raise UserError(f"{format!r} is not a format: choose one of {', '.join(FORMATS)}.")
    if approximate and not 0 < max_error <= 1:
        raise UserError(f"The error of a layer must be in (0, 1], not {max_error:g}.")
    if not is_native(one.path):
        raise UserError(f"{one.name} is a file of another tool already: take it from {one.path}.")
    base, out = require_base(paths, one), paths.runs / EXPORTS_FOLDER / folder_name(one.name)
    if one.is_chat:
        if format != "peft":
            raise UserError(f"{one.name} is an adapter of a vision-language model: choose the format peft.")
        proof = export_chat(one.path, base, format, out)
        proof.check()
        return proof.summary(), [zip_folder(proof.path, out)]
    prompt, width = proof_settings(paths, one)
    error = max_error if approximate else None
    proof = export_adapter(
        one.path, base, format, out, prompt=prompt, max_error=error, drop_bias=drop_bias, width=width
    )
    files = [zip_folder(proof.path, out) if proof.path.is_dir() else str(proof.path)]
    proof.check()
    return proof.summary(), files + [str(word) for word in proof.token_files]


def proof_settings(paths: StudioPaths, one: AdapterEntry) -> tuple[str, int]:
    """Prompt and width of the images that a file is proven with: those of the run, where there is one."""
    config = paths.config(one.run) if one.run else None
    if isinstance(config, DiffusionConfig):
        return config.prompt, config.resolution
    return f"a {one.trigger or 'creature'}", 0


def folder_name(name: str) -> str:
    """A page's name of an adapter as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def zip_folder(folder: Path, out: Path) -> str:
    """A folder as one file to download."""
    name = out / f"{out.name}-{folder.name}"
    return shutil.make_archive(str(name), "zip", root_dir=folder.parent, base_dir=folder.name)


# ---------------------------------------------------------------------------------------------- the page


def build(studio: Studio) -> None:
    """The page."""
    table = gr.Dataframe(headers=TABLE, label="Adapters", interactive=False, wrap=True, elem_id="library-table")
    gallery = gr.Gallery(
        label="The library", columns=8, fit_columns=False, height=220, format="png", object_fit="contain",
        buttons=["fullscreen"], elem_id="library-gallery",
    )  # fmt: skip
    again = gr.Button("Refresh", size="sm", elem_id="library-again")
    shown_in = [table, gallery]
    own, added = add_section(studio, shown_in)
    lists = [own, inspect_section(studio), export_section(studio)]
    places = studio.paths

    @show_errors
    def listing() -> tuple[Rows, list[Any]]:
        return [table_row(one) for one in list_adapters(places).values()], library_thumbnails()

    @show_errors
    def choices() -> tuple[Any, ...]:
        found = list_adapters(places)
        names = gr.Dropdown(choices=list(found))
        return gr.Dropdown(choices=[one.name for one in found.values() if one.run and not one.is_chat]), names, names

    # Through the queue, for outside of it Gradio shows no error's sentence.
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    page = gr.context.Context.root_block
    page.load(listing, None, shown_in, api_name="library", **quiet)
    page.load(choices, None, lists, api_visibility="private", **quiet)
    again.click(listing, None, shown_in, api_visibility="private", **quiet)
    again.click(choices, None, lists, api_visibility="private", **quiet)
    added.then(choices, None, lists, api_visibility="private", **quiet)


def add_section(studio: Studio, shown_in: list[Any]) -> tuple[Any, Any]:
    """A run's adapter into the library; returns the box with the adapters, and what happens when one is added."""
    places = studio.paths

    @show_errors
    def keep(adapter: str | None, name: str, trigger: str) -> tuple[Any, ...]:
        said = add_to_library(places, adapter, name.strip(), trigger)
        return message_html(said), [table_row(one) for one in list_adapters(places).values()], library_thumbnails()

    gr.Markdown("## Add a run's adapter to the library")
    with gr.Row():
        adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter of a run", elem_id="add-adapter")
        name = gr.Textbox(label="Name in the library", placeholder="my-subject", elem_id="add-name")
        trigger = gr.Textbox(label="Trigger words", info="Empty: those it was trained on.", elem_id="add-trigger")
        go = gr.Button("Add to the library", variant="primary", elem_id="add-go")
    said = gr.HTML(label="Added", elem_id="add-said")
    return adapter, go.click(keep, [adapter, name, trigger], [said, *shown_in], api_visibility="private")


def inspect_section(studio: Studio) -> Any:
    """What is in an adapter; returns the box with the adapters."""
    places = studio.paths

    @show_errors
    def inspect(adapter: str | None, file: str | None, against_base: bool) -> tuple[Rows, Rows, str]:
        rows, layers, advice = inspect_source(places, adapter, file, against_base)
        return rows, layers, "".join(map(message_html, advice))

    gr.Markdown("## Inspect")
    with gr.Row():
        adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter", elem_id="inspect-adapter")
        file = gr.File(label="Or a LoRA file", file_types=[".safetensors"], height=150, elem_id="inspect-file")
        against_base = gr.Checkbox(
            label="Compare each change with the base's weight", info="Loads the base.", elem_id="inspect-base"
        )
        go = gr.Button("Inspect", variant="primary", elem_id="inspect-go")
    said = gr.HTML(label="Advice", elem_id="inspect-said")
    facts = gr.Dataframe(
        headers=FACTS,
        label="Facts",
        interactive=False,
        wrap=True,
        column_widths=["25%", "75%"],
        elem_id="inspect-facts",
    )
    with gr.Accordion("Every layer", open=False):
        layers = gr.Dataframe(headers=LAYERS, label="Layers", interactive=False, wrap=True, elem_id="inspect-layers")
    go.click(inspect, [adapter, file, against_base], [facts, layers, said], api_name="inspect", concurrency_id="device")
    return adapter


def export_section(studio: Studio) -> Any:
    """Files for other tools; returns the box with the adapters."""
    places = studio.paths

    @show_errors
    def export(
        adapter: str | None, format: str, approximate: bool, max_error: float, drop_bias: bool
    ) -> tuple[str, Any]:
        lines, files = export_files(
            places, adapter, format, approximate=approximate, max_error=float(max_error or 0), drop_bias=drop_bias
        )
        return "".join(map(message_html, lines)), files

    gr.Markdown("## Export")
    with gr.Row():
        adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter", elem_id="export-adapter")
        format = gr.Dropdown(
            [(FORMAT_LABELS.get(name, name), name) for name in FORMATS],
            value="diffusers",
            label="Format",
            elem_id="export-format",
        )
    with gr.Row():
        approximate = gr.Checkbox(
            label="Allow approximation", min_width=220, elem_id="export-approximate",
            info="Export what the format cannot represent exactly (--approximate); errors are measured.",
        )  # fmt: skip
        max_error = gr.Number(
            0.05, label="Error of a layer, 0 to 1, where it can be chosen", min_width=220, elem_id="export-error"
        )
        drop_bias = gr.Checkbox(
            label="Skip bias changes", min_width=220, elem_id="export-drop-bias",
            info="For tools that cannot read them (--drop-bias).",
        )  # fmt: skip
        go = gr.Button("Export", variant="primary", elem_id="export-go")
    said = gr.HTML(label="Proof", elem_id="export-said")
    files = gr.File(label="Files to download", file_count="multiple", interactive=False, elem_id="export-files")
    boxes = [adapter, format, approximate, max_error, drop_bias]
    go.click(export, boxes, [said, files], api_name="export", concurrency_id="device")
    return adapter
