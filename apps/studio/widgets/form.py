"""A form made from a config class, with the same settings as YAML and as a command beside it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from ....toolkit.adapters.registry import adapter_names, make_config, option_help
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.base import LoopConfig
from ....training.config.checks import check_ranges
from ....training.config.yaml_file import METHODS
from ..backend.paths import StudioPaths, check_name, to_slug
from ..render.messages import message_html, show_errors
from .fields import (
    SWITCH,
    Field,
    config_command,
    config_values,
    fields_of,
    from_input_value,
    parse_config,
    to_input_value,
    values_to_yaml,
)
from .groups import grouped

ADAPTER_TABLE = ["field", "value", "meaning"]


@dataclass(frozen=True)
class External:
    """A setting whose box is no plain one and stands elsewhere on the page."""

    box: Any
    to_value: Callable[[Any], Any]
    """The setting, as YAML has it, that the box means."""
    to_box: Callable[[Any], Any]
    """What the box holds for a setting."""


class Form:
    """The widgets of one method. `basic` stand open, all others under Advanced; `hidden` have no box of the form's own."""

    def __init__(
        self, method: str, basic: tuple[str, ...], hidden: tuple[str, ...] = ("out",), initial: dict[str, Any] | None = None
    ) -> None:  # fmt: skip
        """initial: settings that the boxes begin with, others than the defaults."""
        self.method, self.initial = method, initial or {}
        self.fields = {f.name: f for f in fields_of(METHODS[method]) if f.name not in (*hidden, "adapter_options")}
        self.basic = [name for name in basic if name in self.fields]
        self.rest = [name for name in self.fields if name not in basic]
        self.widgets: dict[str, Any] = {}
        self.external: dict[str, External] = {}
        self.has_adapter = "adapter" in self.fields
        self.id = method

    # -------------------------------------------------------------------------- building

    def build_basic(self) -> None:
        """The settings that everybody looks at."""
        with gr.Row():
            for name in self.basic:
                self.widgets[name] = self.widget(self.fields[name])

    def build_rest(self) -> None:
        """All other settings in groups, with a search, and the adapter's own."""
        with gr.Accordion("Advanced: all settings", open=False, elem_id=f"{self.id}-all"):
            self.search = gr.Textbox(label="Search the settings", placeholder="warmup, mask, precision ...")
            self.groups: list[Any] = []
            for title, names in grouped(self.rest).items():
                with gr.Group(elem_classes="settings") as group:
                    gr.HTML(f"<h3>{title}</h3>", padding=True)
                    with gr.Row():
                        for name in names:
                            self.widgets[name] = self.widget(self.fields[name])
                self.groups.append(group)
            self.options = gr.Dataframe(
                headers=ADAPTER_TABLE,
                value=self.option_rows("moslora", {}) if self.has_adapter else [],
                label="The adapter's own settings (leave a value empty for its default)",
                interactive=True,
                static_columns=[0, 2],
                column_count=3,
                wrap=True,
                visible=self.has_adapter,
                column_widths=["20%", "20%", "60%"],
                elem_id=f"{self.id}-options",
            )

    def build_yaml(self) -> None:
        """The same as YAML, which is what is started, and as a command."""
        default = values_to_yaml(self.method, self.initial)
        with gr.Accordion("Command and YAML", open=False, elem_id=f"{self.id}-texts"):
            self.command = gr.Textbox(
                label="The same in a terminal", lines=3, max_lines=8, interactive=False, buttons=["copy"], elem_id=f"{self.id}-command",
                info="Gives the same adapter, to the bit.",
            )  # fmt: skip
            self.yaml = gr.Code(
                value=default, language="yaml", label="The settings as YAML; download it and start it with: rankfold queue FILE",
                lines=8, interactive=True, elem_id=f"{self.id}-yaml",
            )  # fmt: skip
        self.message = gr.HTML(label="What is wrong with the settings", elem_id=f"{self.id}-said")
        self.written = gr.JSON([default, default], visible=False, label="What was written last")
        """YAML of the boxes, and text of the editor, when both last said the same. In the browser, as these are: a State might already
        hold what an answer on its way there says, and the editor's text would be taken for somebody's own."""

    def widget(self, field: Field) -> Any:
        """The box of a setting."""
        common: dict[str, Any] = {
            "label": field.label, "info": field.help, "elem_id": f"{self.id}-{field.name}",
        }  # fmt: skip
        value = to_input_value(field, self.initial.get(field.name, field.default))
        if field.name == "adapter":
            return gr.Dropdown(adapter_names(), value=value, **common, min_width=200)
        if field.name == "base":
            known = EMBEDDED_VISION if self.method.endswith("instruct") else EMBEDDED
            return gr.Dropdown([*known], value=value, allow_custom_value=True, **common, min_width=200)
        if field.kind == "flag":
            return gr.Checkbox(value=value, **common, min_width=220)
        if field.kind == "switch":
            return gr.Dropdown([*SWITCH.values()], value=value, **common, min_width=200)
        if field.kind == "choice":
            return gr.Dropdown(list(field.choices), value=value, **common, min_width=200)
        if field.kind in ("whole", "number"):
            if field.optional:  # Gradio shows an empty box of numbers as 0, and sends it
                return gr.Textbox(value=value, placeholder="not set", **common, min_width=200)
            return gr.Number(value=value, **common, min_width=200)
        lines = 2 if field.kind in ("texts", "mapping") else 1
        return gr.Textbox(value=value, lines=lines, **common, min_width=200)

    def option_rows(self, adapter: str, values: dict[str, str]) -> list[list[str]]:
        """The adapter's own settings as a table: name, value, meaning."""
        return [
            [name, values.get(name, ""), " ".join(meaning.split())] for name, meaning in option_help(adapter).items()
        ]

    # -------------------------------------------------------------------------- wiring

    @property
    def boxes(self) -> list[Any]:
        """The adapter's own settings and all boxes, in the order in which `boxes_yaml` takes them."""
        return [self.options, *self.widgets.values(), *(one.box for one in self.external.values())]

    @property
    def sides(self) -> list[Any]:
        """What says the same as the boxes: editor, command, what is wrong, and what both said last."""
        return [self.yaml, self.command, self.message, self.written]

    def wire(self, elsewhere: tuple[str, ...] = ()) -> None:
        """Boxes write the YAML, the YAML writes the boxes; the command follows. elsewhere: boxes that the page wires itself."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        inside = [box for name, box in self.widgets.items() if name not in elsewhere]
        # A text box tells of keys only by its input event; by its change also of what was pasted, dictated or filled in.
        changes = [box.change if isinstance(box, gr.Textbox) else box.input for box in inside]
        changes += [self.options.input, *(one.box.change for one in self.external.values())]
        inputs = [self.written, self.yaml, *self.boxes]
        gr.on(changes, show_errors(self.from_boxes), inputs, self.sides, trigger_mode="always_last", **quiet)
        if self.has_adapter:
            self.widgets["adapter"].input(
                show_errors(self.adapter_chosen), self.widgets["adapter"], self.options, **quiet
            )
        self.yaml.blur(
            show_errors(self.from_editor),
            [self.yaml, self.written],
            [self.command, self.message, self.written, *self.boxes],
            **quiet,
        )
        shown = [*(self.widgets[name] for name in self.rest), *self.groups]
        self.search.input(self.filter_fields, self.search, shown, **quiet)

    def adapter_chosen(self, adapter: str) -> list[list[str]]:
        """Another adapter, its own settings."""
        return self.option_rows(adapter, {})

    def from_boxes(self, written: tuple[str, str], before: str, *boxes: Any) -> tuple[Any, ...]:
        """YAML, command, what is wrong, and what was written, from what the boxes hold."""
        try:
            text = self.boxes_yaml(*boxes)
            if text == written[0]:  # the boxes were filled from it; the editor keeps its own words
                return gr.skip(), self.command_text(text), "", gr.skip()
            return text, self.command_text(text), "", (text, text)
        except UserError as error:
            return before, "", message_html(str(error), "fault"), gr.skip()

    def boxes_yaml(self, options: Any, *values: Any) -> str:
        """The YAML of what the boxes hold.

        Raises:
            UserError: for a box that holds no value of its setting.
        """
        own: dict[str, Any] = {}
        for name, value in zip((*self.widgets, *self.external), values, strict=True):
            outer = self.external.get(name)
            own[name] = outer.to_value(value) if outer else from_input_value(self.fields[name], value)
        if self.has_adapter:
            known = option_help(own["adapter"])
            rows = options.values.tolist() if hasattr(options, "values") else options
            chosen = {str(row[0]): str(row[1]).strip() for row in rows if row and row[0] in known}
            own["adapter_options"] = {key: value for key, value in chosen.items() if value}
        return values_to_yaml(self.method, own)

    def settle(self, written: tuple[str, str], text: str, *boxes: Any) -> tuple[Any, ...]:
        """YAML, command, what is wrong, and what was written: what the page shows, whichever way it came into the boxes.

        A box may hold what no event has told of (pasted, dictated, filled in by the browser), and the editor what was typed last.

        Raises:
            UserError: for a fault in the boxes or the editor, or when both were changed and do not say the same.
        """
        boxed = self.boxes_yaml(*boxes)
        before, shown = written
        typed = text.strip() != shown.strip()  # the editor drops the last line break
        if typed:
            text = self.with_external(text, boxed)
        edited = typed and self.normal_yaml(text) != boxed
        if edited and boxed != before:
            raise UserError(
                "The boxes and the YAML were both changed and say different things: undo one of the two changes, or copy it to the other."
            )
        now = text if edited else boxed
        self.check(now)
        return now, self.command_text(now), "", (self.normal_yaml(now), now)

    def check(self, text: str) -> None:
        """Raises UserError for settings that no run could start with."""
        check_ranges(self.config(text))

    def normal_yaml(self, text: str) -> str:
        """The YAML that the boxes have for what this one says."""
        values = config_values(self.config(text))
        known = (*self.fields, *self.external, "adapter_options")
        return values_to_yaml(self.method, {k: v for k, v in values.items() if k in known})

    def with_external(self, text: str, boxed: str) -> str:
        """The text with the settings that have their boxes elsewhere, where it does not say them itself."""
        said, own = (yaml.safe_load(one) for one in (text, boxed))
        self.config(text)
        missing = {name: own[name] for name in self.external if name in own and name not in said}
        return (
            text.rstrip("\n") + "\n" + yaml.safe_dump(missing, sort_keys=False, allow_unicode=True) if missing else text
        )

    def from_editor(self, text: str, written: tuple[str, str]) -> tuple[Any, ...]:
        """The same as `from_yaml`, where the text is another than the boxes' own."""
        if text.strip() == written[1].strip():
            return tuple(gr.skip() for _ in range(3 + len(self.boxes)))
        return self.from_yaml(text)

    def from_yaml(self, text: str) -> tuple[Any, ...]:
        """Command, what is wrong, what was written, the adapter's own settings and all boxes, from the YAML."""
        try:
            config = self.config(text)
        except UserError as error:
            return ("", message_html(str(error), "fault"), *(gr.skip() for _ in range(1 + len(self.boxes))))
        values = config_values(config)
        options = self.option_rows(values["adapter"], values["adapter_options"]) if self.has_adapter else gr.skip()
        boxes = [to_input_value(self.fields[name], values[name]) for name in self.widgets]
        said = yaml.safe_load(text)
        boxes += [one.to_box(values[name]) if name in said else gr.skip() for name, one in self.external.items()]
        return (self.command_text(text), "", (self.normal_yaml(text), text), options, *boxes)

    def config(self, text: str) -> LoopConfig:
        """The config of the YAML, if it is one of this method and its adapter takes these settings."""
        config = parse_config(text)
        if not isinstance(config, METHODS[self.method]):
            raise UserError(f"The settings are not of the method {self.method}.")
        if self.has_adapter:
            own: Any = config
            make_config(
                own.adapter, rank=own.rank or 8, alpha=own.alpha or 8.0, dropout=own.dropout, target_modules=("to_q",),
                options=own.adapter_options,
            )  # fmt: skip
        return config

    def command_text(self, text: str) -> str:
        """The command that does the same."""
        return shlex.join(config_command(self.config(text)))

    def filter_fields(self, wanted: str) -> list[Any]:
        """Which boxes the search shows, and then which of the groups."""
        words = wanted.lower().split()
        found = {
            name: all(word in f"{field.label} {field.name} {field.help}".lower().replace("_", " ") for word in words)
            for name, field in ((name, self.fields[name]) for name in self.rest)
        }
        groups = [any(found[name] for name in names) for names in grouped(self.rest).values()]
        return [gr.update(visible=is_shown) for is_shown in (*found.values(), *groups)]


def run_name_box(form: Form, paths: StudioPaths, value: str, place: str) -> Any:
    """The box with the run's name, which is the form's setting of where it goes."""
    box = gr.Textbox(label="Name of the run", value=value, elem_id=place)
    form.external["out"] = External(
        box, lambda wish: str(paths.runs / check_name(to_slug(wish), "run")), lambda out: Path(out).name
    )
    return box
