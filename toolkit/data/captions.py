"""Captions of a folder's images, from the files that people and other tools write.

Beside an image: `name.txt`, `name.caption`, or `name.json` with a field caption or text. For the whole folder: metadata.jsonl or
metadata.csv with file_name and text (or caption). What stands beside an image goes before a table; two files beside it that differ
are refused. What is read otherwise than it stands there, or not at all, is kept as a note.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.texts import decode_text, read_lines, read_text

SIDECARS = (".txt", ".caption", ".json")
FIELDS = ("text", "caption")
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Captions:
    """The captions of a folder, and what there is to say of the files that they came from."""

    texts: dict[str, str] = field(default_factory=dict)
    """Caption by image name; images without one, or with an empty one, are left out."""
    sources: dict[str, str] = field(default_factory=dict)
    """Name of the file that each caption, empty or not, came from, by image name."""
    notes: list[str] = field(default_factory=list)
    """What was not used, or not read as UTF-8, in sentences."""
    references: dict[str, Any] = field(default_factory=dict)
    """What a table says of an image's references, by image name."""

    @property
    def empty(self) -> list[str]:
        """Images whose caption is there and says nothing."""
        return sorted(name for name in self.sources if name not in self.texts)

    def add(self, name: str, text: str, source: str) -> None:
        """The caption of an image, instead of any other."""
        self.texts.pop(name, None)
        self.sources[name] = source
        if text:
            self.texts[name] = text


def read_captions(folder: Path, files: list[Path], images: set[str]) -> Captions:
    """The captions of a folder's images.

    Raises:
        UserError: for a caption without an image, a file that cannot be read, or two captions of one image.
    """
    captions = Captions()
    read_tables(folder, images, captions)
    stems: dict[str, list[str]] = {}
    for name in images:
        stems.setdefault(Path(name).stem, []).append(name)
    beside: dict[str, tuple[Path, str]] = {}
    unused: set[str] = set()
    for path in files:
        if not is_sidecar(path, stems):
            continue
        if path.stem not in stems:
            raise UserError(f"{path} is a caption without an image: add '{path.stem}.png' (or .jpg) or remove it.")
        text = read_sidecar(path, captions.notes, unused)
        for name in stems[path.stem]:
            if name in beside and beside[name][1] != text:
                raise UserError(
                    f"{beside[name][0].name} and {path.name} in {folder} say something else of {name}: keep one of them."
                )
            beside[name] = path, text
    if unused:
        captions.notes.append(f"Not used of the .json files beside images: {', '.join(sorted(unused))}.")
    for name, (path, text) in beside.items():
        if captions.texts.get(name, text) != text:
            captions.notes.append(
                f"{name} has another caption in {captions.sources[name]}: the one in {path.name} is used."
            )
        captions.add(name, text, path.name)
    return captions


def is_sidecar(path: Path, stems: Iterable[str]) -> bool:
    """Whether a file is a caption by its name; any .json file only beside an image."""
    suffix = path.suffix.lower()
    return suffix in SIDECARS and (suffix != ".json" or path.stem in stems)


def read_sidecar(path: Path, notes: list[str], unused: set[str]) -> str:
    """The caption in a file beside an image. notes, unused: take up what there is to say, and fields that are not read."""
    if path.suffix.lower() != ".json":
        text, encoding = decode_text(path)
        if encoding:
            notes.append(f"{path.name} is not UTF-8 and was read as {encoding}: {text.strip()[:60]!r}. Is that right?")
        return text.strip()
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:100]}.") from error
    text = caption_of(found)
    if text is None:
        raise UserError(
            f"{path} stands beside an image and has no caption: it needs the field caption or text, or another name."
        )
    unused.update(other_fields(found))
    return text


def caption_of(row: Any) -> str | None:
    """The caption in a row of fields, '' where it is null; None where there is no such field."""
    found = [row[field] for field in FIELDS if isinstance(row, dict) and field in row]
    texts = [value for value in found if isinstance(value, str)]
    return texts[0].strip() if texts else "" if found and all(value is None for value in found) else None


def other_fields(row: dict[Any, Any]) -> set[str]:
    """Fields with something in them that captions are not read from."""
    used = {next((name for name in FIELDS if isinstance(row.get(name), str)), FIELDS[0]), "file_name", "references"}
    return {str(name) for name, value in row.items() if name not in used and value not in (None, "", [])}


def read_tables(folder: Path, images: set[str], captions: Captions) -> None:
    """Adds the captions of the folder's metadata.jsonl or metadata.csv."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in found)}: keep one of them.")
    for table in found:
        unused: set[str] = set()
        for number, row in rows_of(table):
            text = caption_of(row)
            if text is None or not isinstance(row.get("file_name"), str):
                has = f", and has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
                raise UserError(f"{table}, line {number}: needs the fields file_name and text{has}.")
            name = row["file_name"].replace("\\", "/").removeprefix("./")
            if name not in images:
                raise UserError(f"{table}, line {number}: there is no image '{name}' in {folder}.")
            if captions.texts.get(name, text) != text:
                raise UserError(f"{table}, line {number}: {name} has had another caption already: keep one of them.")
            captions.add(name, text, table.name)
            if row.get("references"):
                captions.references[name] = row["references"]
            unused |= other_fields(row)
        if unused:
            captions.notes.append(f"Not used of {table.name}: the fields {', '.join(sorted(unused))}.")


def rows_of(table: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows of a table."""
    if table.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(table))), 2):
            if None in row:
                raise UserError(
                    f"{table}, line {number}: has more fields than the first line names; quote a text with commas."
                )
            yield number, row
        return
    for number, line in enumerate(read_lines(table), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table}, line {number}: needs the fields file_name and text.") from error
