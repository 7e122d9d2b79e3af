"""Rows from the files that people have: JSON lines, JSON, CSV, parquet, data sets on disk, clones of the hub, folders with a table.

Whatever the file, a row is what JSON would give: objects, lists, texts, numbers; fields that are null are left out, which tables fill in.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError, did_you_mean
from ..core.texts import read_text

HINTS = {  # by what json says
    "Extra data": " It looks like JSON lines: name it .jsonl.",
    "Invalid \\escape": " A path's backslashes are written twice in JSON, or as /.",
}
JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
DATA_SUFFIXES = (".json", *JSON_LINES, *TABLES, ".parquet")
METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))  # of a folder of images
IGNORED_FILES = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|.*config.*\.json|package.*\.json", re.IGNORECASE
)
SHARD = re.compile(r"^(?P<split>[A-Za-z0-9_]+?)-\d+(-of-\d+)?$")  # of the hub's files: train-00000-of-00002


def read_rows(file: Path, *, split: str = "") -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a file, of a folder, or of the files of a pattern such as data/train-*.parquet.

    split: which one, for a folder that holds several.

    Raises:
        UserError: for what is not there or cannot be read.
    """
    for part in data_files(file, split):
        yield from file_rows(part, split)


def data_files(file: Path, split: str = "") -> list[Path]:
    """The files behind what a user names.

    Raises:
        UserError: where there are none, or it is not clear which are meant.
    """
    if "*" in file.name and not file.exists():
        found = sorted(file.parent.glob(file.name))
        if not found:
            raise UserError(f"--data {file} matches no file.")
        return found
    if not file.exists():
        raise UserError(f"--data {file} does not exist.")
    if not file.is_dir() or is_saved_data_set(file):
        return [file]
    return folder_files(file, split)


def is_saved_data_set(folder: Path) -> bool:
    """Whether the library datasets saved this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder: a table beside images, the shards of a hub's clone, or the one file that it holds.

    Raises:
        UserError: where there are none, or it is not clear which are meant.
    """
    if table := next((folder / name for name in METADATA if (folder / name).is_file()), None):
        return [table]
    splits: dict[str, list[Path]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in DATA_SUFFIXES):
        inside = file.relative_to(folder)
        if IGNORED_FILES.fullmatch(file.name) or any(part.startswith(".") for part in inside.parts):
            continue
        if file.name in METADATA:  # an image folder with splits: train/metadata.jsonl
            splits.setdefault(file.parent.name, []).append(file)
            continue
        shard = SHARD.match(file.stem)
        above = [part for part in inside.parts[:-1] if part != "data"]
        splits.setdefault("/".join([*above, shard["split"] if shard else file.stem]), []).append(file)
    if not splits:
        raise UserError(
            f"--data {folder} is not a data set: it holds none of {', '.join(DATA_SUFFIXES)}. For a folder of images write a "
            'metadata.jsonl in it, each line as {"file_name": "a.jpg", "question": "...", "answer": "..."}.'
        )
    if split:
        if split not in splits:
            raise UserError(
                f"--split {split} is not in {folder}, which holds {', '.join(splits)}.{did_you_mean(split, splits)}"
            )
        return splits[split]
    if len(splits) > 1:
        raise UserError(f"--data {folder} holds several splits, {', '.join(splits)}: choose one with --split.")
    return next(iter(splits.values()))


def file_rows(file: Path, split: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of one file."""
    unit = "row"
    if file.is_dir() or file.suffix == ".parquet":
        rows = enumerate(dataset_rows(file, split), 1)
    elif file.suffix in JSON_LINES:
        rows, unit = read_json_lines(file), "line"
    elif file.suffix in TABLES:
        rows = enumerate(read_table(file), 1)
    elif file.suffix in (".gz", ".zip", ".zst", ".tar", ".xz", ".arrow"):
        raise UserError(
            f"--data {file}: files of type {file.suffix} are not read; unpack it, or save it as .jsonl or .parquet."
        )
    else:
        rows = enumerate(read_json(file), 1)
    for number, row in rows:
        try:
            yield f"{file.name}, {unit} {number}", drop_nulls(row)
        except RecursionError as error:
            raise UserError(f"{file}, {unit} {number} is nested too deep to be a row of data.") from error


def read_json(file: Path) -> list[Any]:
    """The rows of a JSON file."""
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.{HINTS.get(error.msg, '')}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a list of rows: a number in it has too many digits, or it is nested too deep."
        ) from error
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        held = (
            f" It holds an object with {', '.join(map(str, list(rows)[:5]))}: save the list in it."
            if isinstance(rows, dict)
            else ""
        )
        raise UserError(f"{file} must hold a list of rows: [{{...}}, {{...}}].{held}")
    return rows


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file with one JSON object per line; empty lines are none."""
    number = 0
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            hint = HINTS.get(error.msg, "") if error.msg != "Extra data" else ""
            raise UserError(f"{file} is not JSON: {error.msg} at line {number}, column {error.colno}.{hint}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not text in UTF-8: byte {error.start} of a block cannot be read.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: a number has too many digits, or the line is nested too deep."
            ) from error


def read_table(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table with names in its first line; every cell is text, an empty one is null."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = read_text(file).splitlines(keepends=True)
    if not lines:
        raise UserError(f"{file} is empty: its first line must name the columns.")
    mark = TABLES[file.suffix]
    if file.suffix == ".csv" and mark not in lines[0] and ";" in lines[0]:
        mark = ";"
    try:
        for number, row in enumerate(csv.DictReader(lines, delimiter=mark), 1):
            if None in row:
                raise UserError(f"{file}, row {number} has more cells than the first line has names.")
            yield {key: value or None for key, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{file} is not a table: {error}.") from error


def dataset_rows(path: Path, split: str = "") -> Iterator[Any]:
    """The rows of a parquet file or of a folder that `datasets` saved; images come as bytes."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.Dataset.from_parquet(str(path))
    except Exception as error:
        raise UserError(f"--data {path} is not a data set that the library datasets can read: {error}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise UserError(
                f"--data {path} holds several splits, {', '.join(rows)}: name the folder of one of them, or choose one with --split."
            )
        rows = rows[split]
    for name, feature in rows.features.items():  # type: ignore[union-attr]
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):
            plain = datasets.Image(decode=False)
            rows = rows.cast_column(name, plain if inner is feature else datasets.List(plain))
    yield from rows  # type: ignore[misc]


def drop_nulls(value: Any) -> Any:
    """The value without keys whose value is null, which tables fill in."""
    if isinstance(value, dict):
        return {key: drop_nulls(own) for key, own in value.items() if own is not None}
    return [drop_nulls(own) for own in value] if isinstance(value, list) else value


def check_columns_met(columns: Sequence[str], seen: set[str], file: Path) -> None:
    """Raises UserError for a column that no row has. seen: those that were met."""
    for rule in columns:
        theirs = rule.partition("=")[2]
        if theirs not in seen:
            raise UserError(f"--columns {rule}: no row of {file} has a field '{theirs}'.")


def rename_columns(row: Any, columns: Sequence[str], seen: set[str]) -> Any:
    """The row with columns under our names. columns: 'ours=theirs' each, 'ignore=theirs' to leave one out; seen: theirs that were met.

    Raises:
        UserError: for a rule that is not of this form.
    """
    if not isinstance(row, dict) or not columns:
        return row
    row = dict(row)
    for rule in columns:
        ours, equals, theirs = rule.partition("=")
        if not equals or not ours or not theirs:
            raise UserError(f"--columns {rule}: write it as OURS=THEIRS, such as question=Frage, or ignore=THEIRS.")
        if theirs in row:
            seen.add(theirs)
            value = row.pop(theirs)
            if ours != "ignore":
                row[ours] = value
    return row
