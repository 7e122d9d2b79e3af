"""Config classes as forms: each field with its meaning, and how its value looks in a box and in YAML."""

from __future__ import annotations

import ast
import inspect
import json
import math
import textwrap
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ....toolkit.core.errors import UserError
from ....toolkit.core.setting_names import as_flag
from ....training.config.base import LoopConfig
from ....training.config.yaml_file import METHODS, from_yaml_text, to_yaml

LABELS = {"token": "Trigger word", "class_noun": "What it is (dog, person, mug ...)"}  # names that say little in a form
SWITCH: dict[bool | None, str] = {None: "automatic", True: "on", False: "off"}


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    kind: str
    """flag, switch (on, off or unset), whole, number, text, choice, texts (one per line) or mapping (JSON)."""
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False
    or_number: bool = False
    """Whether a text may be a number."""

    @property
    def label(self) -> str:
        """The name in words, or better ones."""
        return LABELS.get(self.name) or self.name.replace("_", " ")


@cache
def fields_of(kind: type) -> tuple[Field, ...]:
    """The settings of a config class, in order."""
    hints, meanings = get_type_hints(kind), field_docs(kind)
    blank = kind()
    return tuple(
        make_field(field.name, hints[field.name], to_plain(getattr(blank, field.name)), meanings.get(field.name, ""))
        for field in fields(kind)
    )


def make_field(name: str, hint: Any, default: Any, meaning: str) -> Field:
    """A field of this type."""
    optional = False
    if get_origin(hint) in (Union, UnionType):  # the former where a limit stood in it
        optional = type(None) in get_args(hint)
        if any(get_origin(arm) is Literal for arm in get_args(hint)) and {int, float} & set(get_args(hint)):
            return Field(name, "text", default, meaning, (), optional, or_number=True)
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is Literal:
        return Field(name, "choice", default, meaning, tuple(str(arm) for arm in get_args(hint)), optional)
    kinds = {bool: "switch" if optional else "flag", int: "whole", float: "number", str: "text", Path: "text"}
    if hint in kinds:
        return Field(name, kinds[hint], default, meaning, (), optional)
    return Field(name, "mapping" if get_origin(hint) is dict else "texts", default, meaning, (), optional)


@cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the docstring below it, with those of the classes it comes from."""
    found: dict[str, str] = {}
    for own in reversed(kind.__mro__):
        if own is object:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(own))).body[0].body  # type: ignore[attr-defined]
        for line, below in pairwise(body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[line.target.id] = " ".join(str(below.value.value).split())  # type: ignore[union-attr]
    return found


def to_plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def to_input_value(field: Field, value: Any) -> Any:
    """A value as its box shows it."""
    if field.kind == "texts":
        return "\n".join(str(one) for one in value or ())
    if field.kind == "mapping":
        return json.dumps(value) if value else ""
    if field.kind == "text":
        return "" if value is None else str(value)
    if field.kind == "switch":
        return SWITCH[value]
    if field.kind in ("whole", "number") and field.optional:  # a box of text, see Form.widget
        return "" if value is None else str(value).removesuffix(".0")
    return value


def from_input_value(field: Field, value: Any) -> Any:
    """What a box holds, as YAML has it.

    Raises:
        UserError: when it does not fit.
    """
    empty = value is None or value == ""
    if field.kind == "texts":
        return [line.strip() for line in str(value or "").splitlines() if line.strip()]
    if field.kind == "mapping":
        try:
            found = {} if empty else json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f'{field.label} must be JSON, such as {{"name": "value"}}.') from error
        return found
    if empty:
        return None if field.optional else field.default
    if field.kind == "switch":
        return next(state for state, text in SWITCH.items() if text == value)
    if field.kind in ("whole", "number"):
        return number_of(field, value)
    return parse_number(value) if field.or_number else value


def number_of(field: Field, value: Any) -> int | float:
    """The number in a box.

    Raises:
        UserError: for a text that is none, or a fraction where a whole number must stand.
    """
    try:
        number = float(str(value).replace("_", "?"))  # Python alone reads 1_000 as a number
    except ValueError:
        number = math.nan
    whole = field.kind == "whole"
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"{field.label} must be a {'whole ' * whole}number, not {str(value)[:60]}.")
    return int(number) if whole else number


def parse_number(text: str) -> int | float | str:
    """The number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def values_to_yaml(method: str, values: dict[str, Any]) -> str:
    """Values as the YAML of a config; what stands at its default is left out."""
    own = {f.name: values[f.name] for f in fields_of(METHODS[method]) if f.name in values}
    changed = {f.name: own[f.name] for f in fields_of(METHODS[method]) if f.name in own and own[f.name] != f.default}
    return yaml.safe_dump({"method": method} | changed, sort_keys=False, allow_unicode=True)


def parse_config(text: str) -> LoopConfig:
    """The config that a YAML text means.

    Raises:
        UserError: for text that is not a config.
    """
    return from_yaml_text(text, "The settings")


def config_values(config: LoopConfig) -> dict[str, Any]:
    """A config's values as YAML has them."""
    values = yaml.safe_load(to_yaml(config))
    del values["method"]
    return values


def config_method(config: LoopConfig) -> str:
    """The name of its method."""
    return next(name for name, kind in METHODS.items() if type(config) is kind)


def config_command(config: LoopConfig) -> list[str]:
    """The words of the command line that do the same."""
    names = {
        "subject": "train subject",
        "instruct": "train instruct",
        "search": "search subject",
        "search-instruct": "search instruct",
        "compose": "compose",
        "compose-instruct": "compose instruct",
    }
    words = ["rankfold", *names[config_method(config)].split()]
    values = config_values(config)
    adapters = values.pop("adapters", []) if config_method(config).startswith("compose") else []
    words += adapters
    for field in fields_of(type(config)):
        value = values.get(field.name, field.default)
        if field.name == "adapters" or value == field.default:
            continue
        flag = as_flag(field.name)
        if field.kind in ("flag", "switch"):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif field.kind == "texts":
            words += [flag, *map(str, value)]
        elif field.kind == "mapping":
            words += [flag, *(str(word) for pair in value.items() for word in pair)]
        else:
            words += [flag, str(value)]
    return words
