"""What an adapter says of itself: rankfold.json in its folder, and the same as texts in the header of a LoRA file.

Every writer and reader goes through `AdapterFacts`. Files of earlier versions, with JSON inside of JSON, are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..core.errors import UserError
from ..core.files import write_text
from ..core.records import parse_json_object

FILE = "rankfold.json"


@dataclass(frozen=True)
class ComposedSource:
    """An adapter that another was composed of."""

    name: str
    hash: str
    """Of its files' content."""


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter says of itself; what it does not say is empty."""

    base: str = ""
    """The base model, as the user named it."""
    kind: str = ""
    """model_type of a vision-language base."""
    adapter: str = ""
    """The method, as `rankfold adapters` names it."""
    token: str = ""
    class_noun: str = ""
    precision: str = ""
    """dtype of the base in training."""
    training_adapter: str = ""
    """Name and hash of an adapter that was in the base's weights while this one was trained, and is no part of it."""
    also: tuple[str, ...] = ()
    """Further subjects, 'TOKEN CLASS NOUN' each."""
    data: tuple[dict[str, Any], ...] = ()
    """A certificate of each data file of conversations (training/instruct/certificate.py)."""
    data_changed: str = ""
    """Data of earlier steps of the run, where they were others."""
    pad_to_square: bool = False
    max_pixels: int | None = None
    min_pixels: int | None = None
    video_frames: int | None = None
    composed_of: tuple[ComposedSource, ...] = ()
    composed_how: str = ""
    composed_weights: dict[str, list[float]] = field(default_factory=dict)
    """Place in the model, or 'everywhere' -> a weight for each of composed_of."""
    composed_cut_error: float = 0.0
    """Largest relative error of a layer's change by a cut to a lower rank."""
    file: str = ""
    """Name of the file that the folder was read from."""
    rankfold_proof: dict[str, Any] = field(default_factory=dict)
    """What the export was compared with, and what was found."""
    other: dict[str, str] = field(default_factory=dict)
    """Everything else in the header of a file, whoever wrote it."""

    @property
    def trigger_words(self) -> str:
        """The words that call the subject, as in 'sks dog'; '' where none are known."""
        return f"{self.token} {self.class_noun}".strip() or self.other.get("modelspec.trigger_phrase", "")

    @property
    def tokens(self) -> list[str]:
        """The rare words of all subjects."""
        more = [name.split() for name in self.also]
        return [token for token in (self.token, *(words[0] for words in more if words)) if token]

    def to_json(self) -> dict[str, Any]:
        """What is said, by name."""
        said = {name: value for name, value in asdict(self).items() if name != "other" and value != EMPTY[name]}
        return said | self.other

    def to_header(self) -> dict[str, str]:
        """The same as texts, which is all that a header holds."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.to_json().items()}

    def save(self, folder: Path) -> None:
        """Writes rankfold.json."""
        write_text(folder / FILE, json.dumps(self.to_json(), indent=1))


EMPTY = asdict(AdapterFacts())


@cache
def field_types() -> dict[str, TypeAdapter[Any]]:
    """What checks the value of each fact."""
    hints = get_type_hints(AdapterFacts)
    return {one.name: TypeAdapter(hints[one.name]) for one in fields(AdapterFacts) if one.name != "other"}


def read_facts(folder: Path) -> AdapterFacts:
    """What a folder says of its adapter in rankfold.json; nothing where there is no such file.

    Raises:
        UserError: when it cannot be read; the sentence names the fact.
    """
    file = folder / FILE
    if not file.is_file():
        return AdapterFacts()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:120]}).") from error
    found, unfit = parse_facts(parse_json_object(text, str(file)))
    if unfit:
        raise UserError(f"{file}: {', '.join(unfit)} cannot be read; restore the file, or delete it.")
    return found


def facts_of_header(header: Mapping[str, str]) -> AdapterFacts:
    """The same from a file's header. An entry of another tool that only bears the name of a fact is kept as it is."""
    found, _ = parse_facts(header)
    return found


def parse_facts(values: Mapping[str, Any]) -> tuple[AdapterFacts, list[str]]:
    """The facts, and the names of those that are not what they should be; as texts, these are among `other`."""
    known: dict[str, Any] = {}
    other: dict[str, str] = {}
    unfit = []
    for name, value in values.items():
        if name in field_types() and value is not None:
            try:
                known[name] = field_types()[name].validate_python(decode(name, value))
                continue
            except ValidationError:
                unfit.append(name)
        if value is not None:
            other[name] = value if isinstance(value, str) else json.dumps(value)
    return AdapterFacts(**known, other=other), unfit


def decode(name: str, value: Any) -> Any:
    """The value of a fact that a header, or rankfold.json of an earlier version, keeps as text."""
    if not isinstance(value, str) or isinstance(EMPTY[name], str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return tuple(value.split(", ")) if name == "also" and value else value
