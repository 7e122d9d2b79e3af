"""Captions of a folder's images, from the files that people and other tools write.

Beside an image: `name.txt`, `name.caption`, or `name.json` with a field caption or text. For the whole folder: metadata.jsonl or
metadata.csv with file_name and text (or caption). What stands beside an image goes before a table; two files beside it that differ
are refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.texts import read_lines, read_text

SIDECARS = (".txt", ".caption", ".json")
FIELDS = ("text", "caption")
TABLES = ("metadata.jsonl", "metadata.csv")


def read_captions(folder: Path, files: list[Path], images: set[str]) -> dict[str, str]:
    """Caption by image name; images without one, or with an empty one, are left out.

    Raises:
        UserError: for a caption without an image, a file that cannot be read, or two captions of one image.
    """
    captions = read_tables(folder, images)
    stems: dict[str, list[str]] = {}
    for name in images:
        stems.setdefault(Path(name).stem, []).append(name)
    beside: dict[str, tuple[Path, str]] = {}
    for path in files:
        if path.suffix.lower() not in SIDECARS or (path.suffix.lower() == ".json" and path.stem not in stems):
            continue
        if path.stem not in stems:
            raise UserError(f"{path} is a caption without an image: add '{path.stem}.png' (or .jpg) or remove it.")
        text = read_sidecar(path)
        for name in stems[path.stem]:
            if name in beside and beside[name][1] != text:
                raise UserError(
                    f"{beside[name][0].name} and {path.name} in {folder} say something else of {name}: keep one of them."
                )
            beside[name] = path, text
    captions |= {name: text for name, (_, text) in beside.items()}
    return {name: text for name, text in captions.items() if text}


def read_sidecar(path: Path) -> str:
    """The caption in a file beside an image."""
    if path.suffix.lower() != ".json":
        return read_text(path).strip()
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:100]}.") from error
    text = caption_of(found)
    if text is None:
        raise UserError(
            f"{path} stands beside an image and has no caption: it needs the field caption or text, or another name."
        )
    return text


def caption_of(row: Any) -> str | None:
    """The caption in a row of fields; None where there is none."""
    texts = [row[field] for field in FIELDS if isinstance(row, dict) and isinstance(row.get(field), str)]
    return texts[0].strip() if texts else None


def read_tables(folder: Path, images: set[str]) -> dict[str, str]:
    """Caption by image name from the folder's metadata.jsonl or metadata.csv."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in found)}: keep one of them.")
    captions: dict[str, str] = {}
    for table in found:
        for number, row in rows_of(table):
            text = caption_of(row)
            if text is None or not isinstance(row.get("file_name"), str):
                raise UserError(f"{table}, line {number}: needs the fields file_name and text.")
            name = row["file_name"].replace("\\", "/").removeprefix("./")
            if name not in images:
                raise UserError(f"{table}, line {number}: there is no image '{name}' in {folder}.")
            captions[name] = text
    return captions


def rows_of(table: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows of a table."""
    if table.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(table))), 2):
            yield number, row
        return
    for number, line in enumerate(read_lines(table), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table}, line {number}: needs the fields file_name and text.") from error
