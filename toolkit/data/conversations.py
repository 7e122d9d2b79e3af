"""Conversations about images, read from the files that people have.

    LLaVA     [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}]
    ShareGPT  the same with "images": ["a.jpg", "b.jpg"]
    chat      [{"messages": [{"role": "user", "content": "..." or [{"type": "image", ...}, {"type": "text", ...}]}], "images": [...]}]
    questions [{"image": "a.jpg", "question": "What is it?", "answer": "a cat"}]

as JSON, JSON lines, or parquet and data-set folders (by the library datasets). Rows without an image are welcome. Whatever the file
says, a row becomes chat messages whose content is a list of {"type": "image"} and {"type": "text", "text": ...}, and its images in
the order of those blocks. Blanks around texts and fields that are null are dropped: chat templates disagree about both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.texts import read_text
from .images import IMAGE_KEYS, ImageSource, parse_source

IMAGE_MARK = "<image>"  # where an image stands in a text
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
Message = dict[str, Any]
HINTS = {  # by what json says
    "Extra data": " It looks like JSON lines: name it .jsonl.",
    "Invalid \\escape": " A path's backslashes are written twice in JSON, or as /.",
}


@dataclass(frozen=True)
class Conversation:
    """One row: messages as chat templates take them, and their images."""

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]
    location: str
    """Where it stands, for errors: 'data.json, row 3'."""

    def until(self, count: int) -> Conversation:
        """Its first `count` messages, with their images."""
        messages = self.messages[:count]
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        return replace(self, messages=messages, images=self.images[:images])


@dataclass(frozen=True)
class ConversationFile:
    """What a data file gave."""

    rows: list[Conversation]
    faults: list[str]
    """One sentence for each row that was left out."""


def read_conversations(file: Path, images: Path | None = None, *, skip_bad: bool = False) -> ConversationFile:
    """All conversations of a file.

    images: what images' paths start from, by default the file's own folder; skip_bad: leave out rows that cannot be used, instead of
    stopping at the first.

    Raises:
        UserError: naming the file, and line and column or the row, of what is wrong.
    """
    if not Path(file).exists():
        raise UserError(f"--data {file} does not exist.")
    images = Path(images or Path(file).parent)
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder.")
    rows: list[Conversation] = []
    faults: list[str] = []
    for place, row in read_rows(Path(file)):
        try:
            rows.append(parse_conversation(row, images, place))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{place}: {error} (--skip-bad leaves such rows out.)") from error
            faults.append(f"{place}: {error}")
    if not rows:
        raise UserError(f"{file}: none of its {len(faults)} rows can be used. {faults[0] if faults else ''}".strip())
    return ConversationFile(rows, faults)


# ---------------------------------------------------------------------------------------------- files


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a file."""
    if not file.exists():
        raise UserError(f"--data {file} does not exist.")
    if file.is_dir() or file.suffix == ".parquet":
        rows, unit = enumerate(dataset_rows(file), 1), "row"
    elif file.suffix == ".jsonl":
        rows, unit = read_json_lines(file), "line"
    else:
        rows, unit = enumerate(read_json(file), 1), "row"
    for number, row in rows:
        yield f"{file.name}, {unit} {number}", drop_nulls(row)


def read_json(file: Path) -> list[Any]:
    """The rows of a JSON file."""
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.{HINTS.get(error.msg, '')}"
        ) from error
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a list of rows: [{{...}}, {{...}}].")
    return rows


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file with one JSON object per line; empty lines are none."""
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


def dataset_rows(path: Path) -> Iterator[Any]:
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
        raise UserError(f"--data {path} holds several splits, {', '.join(rows)}: name the folder of one of them.")
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


# ---------------------------------------------------------------------------------------------- rows


def parse_conversation(row: Any, images: Path, location: str) -> Conversation:
    """A row of any of the formats.

    Raises:
        UserError: a sentence that says what is wrong with the row, without its place.
    """
    if not isinstance(row, dict):
        raise UserError(f"the row must be an object, not {type(row).__name__}.")
    messages, inline = parse_messages(row)
    given = row["images"] if row.get("images", []) != [] else row.get("image", [])
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if inline and given:
        raise UserError("images stand both in the messages and beside them: keep one of the two.")
    check_turns(messages)
    if given and not marks:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"}] * len(given)
    elif marks != len(inline or given):
        raise UserError(f"there are {marks} marks {IMAGE_MARK} for {len(inline or given)} images.")
    return Conversation(tuple(messages), tuple(parse_source(value, images) for value in inline or given), location)


def parse_messages(row: dict[str, Any]) -> tuple[list[Message], list[Any]]:
    """The messages of a row, and the images that stand within them."""
    inline: list[Any] = []
    if "question" in row:
        known = reference_answers(row)
        if not known:
            raise UserError("the row has a question and no answer.")
        turns = [("user", row["question"]), ("assistant", known[0])]
    else:
        field = next((name for name in ("conversations", "messages") if name in row), None)
        if field is None:
            raise UserError("the row has none of the fields conversations, messages or question.")
        if not isinstance(row[field], list) or not all(isinstance(turn, dict) for turn in row[field]):
            raise UserError(f"the field {field} must be a list of objects, one per message.")
        turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in row[field]]
    messages = []
    for role, content in turns:
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"the role '{role}' is unknown; known are {', '.join(ROLES)}.")
        messages.append({"role": ROLES[role], "content": parse_content(content, inline)})
    return messages, inline


def reference_answers(row: dict[str, Any]) -> list[str]:
    """The right answers of a row with a question: of `answers` (texts, or objects with an `answer`), or of `answer`."""
    given = row.get("answers", row.get("answer"))
    given = given if isinstance(given, list) else [] if given is None else [given]
    return [str(one.get("answer", "") if isinstance(one, dict) else one) for one in given]


def parse_content(content: Any, inline: list[Any]) -> list[dict[str, str]]:
    """A message's content as blocks; images named in blocks are appended to `inline`."""
    if isinstance(content, str):
        return split_image_marks(content)
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise UserError(f"a message's content must be text or a list of blocks, not {content!r}.")
    parts = []
    for block in content:
        kind = block.get("type")
        if kind == "text":
            parts += split_image_marks(str(block.get("text", "")))
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            if set(block) & set(IMAGE_KEYS):
                inline.append({key: value for key, value in block.items() if key in IMAGE_KEYS})
        else:
            raise UserError(f"a block of type '{kind}' cannot be used: known are text and image.")
    return parts


def split_image_marks(text: str) -> list[dict[str, str]]:
    """A text with marks as blocks."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def check_turns(messages: list[Message]) -> None:
    """Raises UserError when questions and answers do not take turns, or an answer is empty or holds an image."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise UserError("the row has no messages.")
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            raise UserError(f"message {number + 1} is the {message['role']}'s where the {wanted}'s should be.")
        if wanted == "assistant":
            if any(part["type"] == "image" for part in message["content"]):
                raise UserError("an answer holds an image, which a model that answers in text cannot learn.")
            if not any(part["text"] for part in message["content"]):
                raise UserError("an answer is empty.")
        elif not message["content"]:
            raise UserError("a question is empty.")
    if len(turns) % 2:
        raise UserError("the last question has no answer.")
