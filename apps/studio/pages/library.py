"""Library: all adapters at a glance, runs' adapters kept under a name, what is inside a file, and files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ....pipelines.chat import open_chat
from ....pipelines.generate import Recipe, load_pipeline
from ....toolkit.core.errors import UserError
from ....toolkit.formats.folder_report import inspect_adapter
from ....toolkit.formats.report import Report
from ....toolkit.formats.write import FORMATS
from ..backend.adapter_cards import adapter_cards
from ..backend.adapter_export import export_files, require_base
from ..backend.adapter_list import AdapterEntry, add_to_library, find_adapter, import_file, list_adapters
from ..backend.bases import known_bases
from ..backend.context import Studio
from ..backend.housekeeping import delete_entry, deletion_of_entry, rename_entry
from ..backend.hub_push import check_repository, hub_token, push_files
from ..backend.paths import StudioPaths, to_slug
from ..backend.turns import calling_client
from ..render.messages import message_html, show_errors
from ..widgets.actions import act, beside
from ..widgets.deletion import Deletion

KEPT = "library: "  # before the names of the library's adapters
TABLE = ["name", "where", "base", "trigger", "kind"]
FACTS = ["Property", "Value"]
LAYERS = ["layer", "method", "rank", "scale", "size of the change", "over the weight", "fault"]
FORMAT_LABELS = {
    "diffusers": "diffusers: load_lora_weights",
    "peft": "peft: PeftModel.from_pretrained (a zip)",
    "kohya": "kohya: A1111, ComfyUI, kohya's tools",
    "kohya-full": "kohya-full: whole weight changes",
    "kohya-glora": "kohya-glora: GLoRA's own factors",
}
PUSH_LABEL = """(name, hidden) => ({__type__: "update", value: name.trim()
  ? `Push to ${name.trim()} (${hidden ? "private" : "public"})` : "Push"})"""
Rows = list[list[Any]]


# ---------------------------------------------------------------------------------------------- all adapters


def table_row(one: AdapterEntry) -> list[str]:
    """Its row of TABLE."""
    facts = one.facts
    kind = facts.adapter or "lora"
    if facts.composed_of:
        kind += f", composed of {len(facts.composed_of)}"
    return [one.name, "library" if one.run is None else "runs", facts.base or "-", one.trigger or "-", kind]


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


# ---------------------------------------------------------------------------------------------- the page


class LibraryPage:
    """The page's boxes, and what happens."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.paths = studio, studio.paths

    # -------------------------------------------------------------------------- building

    def build(self) -> None:
        """The cards, and below them what one does with an adapter."""
        self.gallery = gr.Gallery(
            label="Adapters: click one to choose it", columns=6, height="max-content", format="png", object_fit="cover", fit_columns=False,
            allow_preview=False, buttons=[], elem_id="library-gallery",
        )  # fmt: skip
        self.again = gr.Button("Refresh", size="sm", elem_id="library-again")
        self.said = gr.HTML(label="Library", elem_id="library-said")
        with gr.Accordion("All adapters as a table", open=False):
            self.table = gr.Dataframe(
                headers=TABLE, label="Adapters", interactive=False, wrap=True, elem_id="library-table"
            )
        with gr.Tabs():
            with gr.Tab("Export"):
                self.build_export()
            with gr.Tab("Add and import"):
                self.build_add()
                self.build_import()
            with gr.Tab("Inspect"):
                self.build_inspect()
            with gr.Tab("Rename and delete"):
                self.build_manage()

    def build_add(self) -> None:
        """A run's adapter into the library."""
        gr.Markdown("## Keep a run's adapter")
        with gr.Row():
            self.add_adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter of a run", elem_id="add-adapter")
            self.add_name = gr.Textbox(label="Name in the library", placeholder="my-subject", elem_id="add-name")
            self.add_trigger = gr.Textbox(
                label="Trigger words", info="Empty: those it was trained on.", elem_id="add-trigger"
            )
            self.add_go = gr.Button("Add to the library", variant="primary", elem_id="add-go")
        self.add_said = gr.HTML(label="Added", elem_id="add-said")

    def build_import(self) -> None:
        """A LoRA file of another tool into the library."""
        gr.Markdown("## Import a LoRA file")
        with gr.Row():
            self.import_file = gr.File(
                label="LoRA file of any tool", file_types=[".safetensors"], height=150, elem_id="import-file"
            )
            with gr.Column():
                self.import_base = gr.Dropdown(
                    [card.name for card in known_bases()], value=None, allow_custom_value=True, label="Base it was made for",
                    info="Empty: what the file says.", elem_id="import-base",
                )  # fmt: skip
                self.import_trigger = gr.Textbox(label="Trigger words of the file", elem_id="import-trigger")
            with gr.Column():
                self.import_name = gr.Textbox(label="Name for it", info="Empty: the file's own.", elem_id="import-name")
                self.import_go = gr.Button("Import", variant="primary", elem_id="import-go")
        self.import_said = gr.HTML(label="Imported", elem_id="import-said")

    def build_inspect(self) -> None:
        """What is in an adapter."""
        with gr.Row():
            self.inspect_adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter", elem_id="inspect-adapter")
            self.inspect_file = gr.File(
                label="Or a LoRA file", file_types=[".safetensors"], height=150, elem_id="inspect-file"
            )
            self.against_base = gr.Checkbox(
                label="Compare each change with the base's weight", info="Loads the base.", elem_id="inspect-base"
            )
            self.inspect_go = gr.Button("Inspect", variant="primary", elem_id="inspect-go")
        self.inspect_said = gr.HTML(label="Advice", elem_id="inspect-said")
        self.facts = gr.Dataframe(
            headers=FACTS, label="Facts", interactive=False, wrap=True, column_widths=["25%", "75%"], elem_id="inspect-facts"
        )  # fmt: skip
        with gr.Accordion("Every layer", open=False):
            self.layers = gr.Dataframe(
                headers=LAYERS, label="Layers", interactive=False, wrap=True, elem_id="inspect-layers"
            )

    def build_export(self) -> None:
        """Files for other tools."""
        with gr.Row():
            self.export_adapter = gr.Dropdown([], allow_custom_value=True, label="Adapter", elem_id="export-adapter")
            self.format = gr.Dropdown(
                [(FORMAT_LABELS.get(name, name), name) for name in FORMATS], value="diffusers", label="Format",
                allow_custom_value=True, elem_id="export-format",
            )  # fmt: skip
            self.export_go = gr.Button("Export", variant="primary", elem_id="export-go")
        with gr.Accordion("What the format cannot hold", open=False), gr.Row():
            self.approximate = gr.Checkbox(
                label="Allow approximation", min_width=220, elem_id="export-approximate",
                info="Export what the format cannot represent exactly (--approximate); errors are measured.",
            )  # fmt: skip
            self.max_error = gr.Number(
                0.05, label="Error of a layer, 0 to 1, where it can be chosen", min_width=220, elem_id="export-error"
            )
            self.drop_bias = gr.Checkbox(
                label="Skip bias changes", min_width=220, elem_id="export-drop-bias",
                info="For tools that cannot read them (--drop-bias).",
            )  # fmt: skip
        self.export_said = gr.HTML(label="Proof", elem_id="export-said")
        self.files = gr.File(
            label="Files to download", file_count="multiple", interactive=False, elem_id="export-files"
        )
        with gr.Accordion("Push to the Hugging Face Hub", open=False, elem_id="push"), gr.Row():
            with gr.Column(scale=2, min_width=240):
                self.repository = gr.Textbox(
                    label="Repository", placeholder="USER/NAME", elem_id="push-repository",
                    info="It gets the adapter above, in the format chosen above, with a model card.",
                )  # fmt: skip
            with gr.Column(scale=1, min_width=200):
                self.private = gr.Checkbox(label="Private", value=True, elem_id="push-private")
                self.push_go = gr.Button("Push", elem_id="push-go")
        self.push_said = gr.HTML(label="Pushed", elem_id="push-said")

    def build_manage(self) -> None:
        """Adapters of the library renamed and deleted; those of runs are on the Watch page."""
        with gr.Row():
            with gr.Column():
                self.kept = gr.Dropdown(
                    [], allow_custom_value=True, label="Adapter of the library", elem_id="manage-adapter"
                )
            with gr.Column():
                self.new_name = gr.Textbox(label="New name", elem_id="manage-name")
                self.rename = gr.Button("Rename", size="sm", elem_id="manage-rename")
            with gr.Column():
                self.deletion = Deletion("Delete from the library", "manage")
        self.manage_said = gr.HTML(label="Renamed or deleted", elem_id="manage-said")

    # -------------------------------------------------------------------------- what is shown

    @property
    def lists(self) -> list[Any]:
        """Everything that shows which adapters there are."""
        return [self.gallery, self.table, self.add_adapter, self.inspect_adapter, self.export_adapter, self.kept]

    def listing(self, chosen: str | None = None) -> tuple[Any, ...]:
        """The adapters that there are now, for `lists`; chosen: the one that the boxes shall hold."""
        found = list_adapters(self.paths)
        own = [name for name, one in found.items() if one.run and not one.is_chat]
        kept = [name.removeprefix(KEPT) for name in found if name.startswith(KEPT)]
        rows = [table_row(one) for one in found.values()]
        picked = {"value": chosen} if chosen in found else {}
        picked_own = {"value": chosen} if chosen in own else {}
        picked_kept = {"value": chosen.removeprefix(KEPT)} if chosen and chosen.removeprefix(KEPT) in kept else {}
        return (
            adapter_cards(found.values(), self.paths), rows, gr.Dropdown(choices=own, **picked_own),
            *(gr.Dropdown(choices=list(found), **picked) for _ in range(2)), gr.Dropdown(choices=kept, **picked_kept),
        )  # fmt: skip

    def choose(self, event: gr.SelectData) -> tuple[Any, ...]:
        """The adapter whose card was clicked, in every box."""
        caption = str(event.value.get("caption")) if isinstance(event.value, dict) else ""
        name = find_adapter(self.paths, caption.split(" · ")[0]).name
        return message_html(f"Chosen: {name}."), *self.listing(name)

    # -------------------------------------------------------------------------- what the buttons do

    def keep(self, adapter: str | None, name: str, trigger: str) -> tuple[Any, ...]:
        """A run's adapter into the library."""
        text = add_to_library(self.paths, adapter, to_slug(name), trigger or "")
        return message_html(text), *self.listing()

    def take_file(self, file: str | None, name: str, base: str | None, trigger: str) -> tuple[Any, ...]:
        """A LoRA file into the library."""
        if not file:
            raise UserError("No file has been chosen: drop a .safetensors file into the box.")
        own = base and self.paths.base(base)
        text = import_file(file, to_slug(name) or to_slug(Path(file).stem), own or "", (trigger or "").strip())
        return message_html(text), *self.listing()

    def inspect(self, adapter: str | None, file: str | None, against_base: bool) -> tuple[Rows, Rows, str]:
        """What is in an adapter."""
        with self.studio.turns.wait(calling_client()):
            rows, layers, advice = inspect_source(self.paths, adapter, file, against_base)
        return rows, layers, "".join(map(message_html, advice))

    def export(
        self, adapter: str | None, format: str, approximate: bool, max_error: float, drop_bias: bool
    ) -> tuple[str, Any]:
        """Files for other tools."""
        with self.studio.turns.wait(calling_client()):
            lines, files = export_files(
                self.paths,
                adapter,
                format,
                approximate=approximate,
                max_error=float(max_error or 0),
                drop_bias=drop_bias,
            )
        return "".join(map(message_html, lines)), files

    def push(self, repository: str | None, private: bool, *export: Any) -> str:
        """Exports an adapter, proves it, and uploads it to the hub."""
        name = check_repository(repository)
        hub_token()  # before the work
        one = find_adapter(self.paths, export[0])
        _, files = self.export(*export)
        return message_html(push_files(one, files, name, private=private))

    def rename_kept(self, name: str | None, wish: str) -> tuple[Any, ...]:
        """Another name for an adapter of the library."""
        new = to_slug(wish)
        text = rename_entry(self.paths, name or "", new)
        return message_html(text), *self.listing(KEPT + new), ""

    # -------------------------------------------------------------------------- wiring

    def wire(self) -> None:
        """What happens."""
        page, said = gr.context.Context.root_block, self.said

        def load(request: gr.Request) -> tuple[Any, ...]:
            return "", *self.listing(request.query_params.get("adapter"))

        def named() -> tuple[Any, ...]:
            return self.listing()[1], self.listing()[0]

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        page.load(beside(load, 0, 1 + len(self.lists)), None, [said, *self.lists], **quiet)
        gr.on([], show_errors(named), None, [self.table, self.gallery], api_name="library")
        act(self.again, lambda: ("", *self.listing()), None, [said, *self.lists], said)
        act(self.gallery.select, self.choose, None, [said, *self.lists], said)
        act(
            self.add_go, self.keep, [self.add_adapter, self.add_name, self.add_trigger], [self.add_said, *self.lists], self.add_said
        )  # fmt: skip
        given = [self.import_file, self.import_name, self.import_base, self.import_trigger]
        act(self.import_go, self.take_file, given, [self.import_said, *self.lists], self.import_said)
        act(
            self.inspect_go, self.inspect, [self.inspect_adapter, self.inspect_file, self.against_base],
            [self.facts, self.layers, self.inspect_said], self.inspect_said, api_name="inspect", concurrency_limit=None,
        )  # fmt: skip
        boxes = [self.export_adapter, self.format, self.approximate, self.max_error, self.drop_bias]
        act(
            self.export_go, self.export, boxes, [self.export_said, self.files], self.export_said, api_name="export",
            concurrency_limit=None,
        )  # fmt: skip
        act(
            self.push_go, self.push, [self.repository, self.private, *boxes], [self.push_said], self.push_said, concurrency_limit=None
        )  # fmt: skip
        gr.on(
            [self.repository.change, self.private.change], None, [self.repository, self.private], self.push_go, js=PUSH_LABEL, **quiet
        )  # fmt: skip
        act(
            self.rename, self.rename_kept, [self.kept, self.new_name], [self.manage_said, *self.lists, self.new_name], self.manage_said
        )  # fmt: skip
        self.deletion.wire(
            lambda name: deletion_of_entry(self.paths, name or ""), lambda name: delete_entry(self.paths, name), self.kept,
            self.manage_said, self.listing, self.lists,
        )  # fmt: skip


def build(studio: Studio) -> None:
    """The page."""
    page = LibraryPage(studio)
    page.build()
    page.wire()
