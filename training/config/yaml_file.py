"""Configs as YAML, of every method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...toolkit.core.errors import UserError, did_you_mean
from ...toolkit.core.paths import expand_user
from ...toolkit.core.setting_names import current_names
from ...toolkit.core.texts import read_text
from ...toolkit.core.yaml_text import parse_yaml
from .base import LoopConfig
from .compose import ComposeConfig, ComposeInstructConfig
from .instruct import InstructConfig
from .search import InstructSearchConfig, SearchConfig
from .subject import SubjectConfig

METHODS: dict[str, type[LoopConfig]] = {
    "subject": SubjectConfig,
    "compose": ComposeConfig,
    "search": SearchConfig,
    "instruct": InstructConfig,
    "search-instruct": InstructSearchConfig,
    "compose-instruct": ComposeInstructConfig,
}


def method_name(config: LoopConfig) -> str:
    """The name of a config's method."""
    return next(name for name, kind in METHODS.items() if type(config) is kind)


def to_yaml(config: LoopConfig) -> str:
    """The complete config as YAML, its method first; `from_yaml` reads it back."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.as_posix()  # which every system reads, so that a run may move to another
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(
        {"method": method_name(config)} | {k: plain(v) for k, v in asdict(config).items()}, sort_keys=False
    )


def from_yaml(path: Path) -> Any:
    """Reads a config file, of the class that its `method` names (subject if it names none); unset fields take their defaults.

    Raises:
        UserError: for a file that cannot be read, an unknown key (with the nearest name), a key given under its former name too, or a
            value of the wrong type.
    """
    try:
        return from_yaml_text(read_text(expand_user(path)), str(path))
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from error


def from_yaml_text(text: str, path: str) -> Any:
    """The same for a config as text. path: what errors call it."""
    from pydantic import TypeAdapter, ValidationError

    try:
        values = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path} {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'name: value' lines.")
    method = values.pop("method", "subject")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"{path}: unknown method '{method}'.{did_you_mean(str(method), METHODS)}")
    known = [f.name for f in fields(METHODS[method])]
    values = current_names(values, known, path)
    for key in values:
        if not isinstance(key, str) or key not in known:
            raise UserError(f"{path}: unknown key '{key}'.{did_you_mean(str(key), known)}")
        if isinstance(values[key], bool) and not takes_switch(METHODS[method], key):
            raise UserError(
                f"{path}: '{key}' is no switch, so it cannot be {str(values[key]).lower()} (which YAML makes of yes, no, on and off, too): "
                "write its value, or a text in quotes."
            )
    try:
        return TypeAdapter(METHODS[method]).validate_python(values)
    except ValidationError as error:
        first, *others = error.errors()
        place, message = ".".join(str(part) for part in first["loc"]), first["msg"].lower()
        if takes_one_of(METHODS[method], name := str(first["loc"][0])):  # each of which has its say
            place = name
            message = ", or ".join(one["msg"].lower() for one in (first, *others) if one["loc"][0] == name)
        cure = f" Write a list: `{place}: [{first['input']}]`." if first["type"] == "tuple_type" else ""
        raise UserError(f"{path}: '{place}' cannot be {first['input']!r}: {message}.{cure}") from error


def takes_one_of(kind: type, name: str) -> bool:
    """Whether a field of a config may be of several types, such as a number or a word."""
    hint = get_type_hints(kind)[name]
    return get_origin(hint) in (Union, UnionType) and len({*get_args(hint)} - {type(None)}) > 1


def takes_switch(kind: type, name: str) -> bool:
    """Whether a field of a config may be true or false."""

    def within(hint: Any) -> Iterator[Any]:
        yield hint
        for part in get_args(hint):
            yield from within(part)

    return bool in within(get_type_hints(kind)[name])
