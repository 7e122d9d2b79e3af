"""The fields of a row of conversations: the one place that says which are used, and what becomes of every other.

What would change the meaning of a row and cannot be learned is refused; what is merely not used is counted, and told once before a
run. Names that nobody listed are judged by what they hold: a path to a video is a video under any name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UserError
from .images import IMAGE_STARTS

CONVERSATIONS = ("conversations", "messages", "conversation", "dialog", "dialogue")
PAIRS = ("texts",)  # of [{"user": ..., "assistant": ...}], as in The Cauldron
QUESTIONS = ("question", "query", "prompt", "instruction")
ANSWERS = ("answers", "answer", "response", "completion", "output")
MORE_QUESTION = ("input",)  # Alpaca's, which follows the instruction
HISTORY = ("history",)
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CHOICES = ("choices", "options")
IMAGES = ("images", "image")
OTHER_IMAGES = (
    "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url", "image_urls", "image_bytes", "image_base64",
    "img", "imgs", "img_path", "img_paths", "file_name", "filename", "file_names", "picture", "pictures", "photo", "photos",
)  # fmt: skip
VIDEOS = ("videos", "video")
OTHER_VIDEOS = (
    "video_path", "video_paths", "video_file", "video_files", "video_name", "video_url", "video_urls", "frames", "video_frames",
)  # fmt: skip
FPS = "fps"  # frames per second, of videos that are given as frames
NUMBERED_IMAGE = re.compile(r"(?:image|img|picture|photo)[ _-]?(\d+)", re.IGNORECASE)
OBJECTS = ("objects",)
METADATA = (
    "id", "idx", "index", "uid", "uuid", "question_id", "image_id", "sample_id", "qid", "split", "category", "source", "dataset",
    "type", "task", "language", "license", "width", "height", "size",
)  # fmt: skip

MEDIA = re.compile(r"(^|_)(video|videos|audio|audios|speech|sound|frames|clip|clips)($|_)", re.IGNORECASE)
PREFERENCE = re.compile(
    r"(^|_)(chosen|rejected|reject|preferred|dispreferred|nonpreferred|preference|kto)($|_)", re.IGNORECASE
)
SYSTEM_WORD = re.compile(r"sys(tem)?([ _-].*)?", re.IGNORECASE)  # a name that looks like a system prompt's
ROW_LOSS = re.compile(r"loss|(loss|sample|example|row)_(weight|scale|mask)|train_on_\w+|trainable", re.IGNORECASE)
TURN_LOSS = re.compile(
    r"(^|_)(loss|train|trained|training|trainable|learn|learned|masks?|masked|weights?|supervised?|ignored?|skip)($|_)",
    re.IGNORECASE,
)
PART_OF_VIDEO = re.compile(
    r"((video|clip|segment)_?)?(start|end|begin|stop)(_?(time|sec|seconds|frame))?", re.IGNORECASE
)
TOOLS = ("tools", "functions", "available_tools", "tool_calls", "function_call")
VIDEO_FILE = re.compile(r"\.(mp4|avi|mov|mkv|webm|flv|wmv|m4v|mpe?g)$", re.IGNORECASE)
AUDIO_FILE = re.compile(r"\.(wav|mp3|flac|ogg|m4a|aac|opus)$", re.IGNORECASE)
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?|avif|heic)$", re.IGNORECASE)

# ---------------------------------------------------------------------------------------------- of a turn

TURN_ROLES, TURN_TEXTS = ("from", "role"), ("value", "content")
TURN_IMAGES = ("images", "image")
TURN_WEIGHTS = ("loss", "train", "weight", "loss_weight")  # ms-swift's, axolotl's, OpenAI's, ours
TURN_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
TURN_CALLS = ("tool_calls", "tool_call_id", "function_call")
BLOCK_FIELDS = ("type", "text", "index", "detail", "source", "mime_type", "media_type")

PREFERENCE_ADVICE = (
    "says which of two answers is the better, and `rankfold train instruct` learns one answer: learn preferences with TRL's DPOTrainer, or "
    "keep the good answer alone with --columns (answer=chosen ignore=rejected)."
)


@dataclass
class UnusedFields:
    """Fields that are not used, counted over all rows."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, names: Iterable[str], where: str = "") -> None:
        """Counts fields of one row. where: 'turn' or 'block', for those that are not the row's own."""
        self.counts.update({f"{where} field '{name}'".strip() for name in names})

    def describe(self) -> str:
        """What was not used, in a sentence; '' when all was."""
        if not self.counts:
            return ""
        listed = ", ".join(f"{name} ({count} row{'s' * (count > 1)})" for name, count in self.counts.most_common())
        return f"Not used: {listed}."


def first_field(row: dict[str, Any], names: Iterable[str], what: str) -> str | None:
    """The one of these fields that a row has; None for none.

    Raises:
        UserError: when it has several.
    """
    found = [name for name in names if not is_empty(row.get(name))]
    if len(found) > 1:
        raise UserError(
            f"the row gives its {what} twice, as '{found[0]}' and as '{found[1]}': leave one out, --columns ignore={found[1]}."
        )
    return found[0] if found else None


def is_empty(value: Any) -> bool:
    """Whether a field says nothing."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)


def row_images(row: dict[str, Any], used: set[str]) -> list[Any]:
    """The images that stand beside a row's texts, whatever the field is called. used: gets the names.

    Raises:
        UserError: where several fields name images, and none of them is 'images' or 'image'.
    """
    if all(not is_empty(row.get(name)) for name in IMAGES):
        if as_list(row["images"]) != as_list(row["image"]):
            raise UserError(
                "the row has both 'image' and 'images', which differ: leave one out, --columns ignore=image."
            )
        used.update(IMAGES)
        return as_list(row["images"])
    used.update(IMAGES)
    numbered = sorted(
        (int(match[1]), name) for name in row if (match := NUMBERED_IMAGE.fullmatch(name)) and not is_empty(row[name])
    )
    for name in IMAGES:
        if name in row and not (isinstance(row[name], (list, tuple)) and not row[name]):
            return [*as_list(row[name]), *images_behind(row, name, numbered, used)]
    others = [name for name in row if name.lower() in OTHER_IMAGES and not is_empty(row[name])]
    if numbered and not others:
        used.update(name for _, name in numbered)
        return [image for _, name in numbered for image in as_list(row[name])]
    if len(others) + bool(numbered) > 1:
        names = [*others, *(name for _, name in numbered[:1])]
        raise UserError(f"the fields {', '.join(names)} all name images: say which, --columns image={names[0]}.")
    used.update(others)
    return as_list(row[others[0]]) if others else []


def images_behind(row: dict[str, Any], name: str, numbered: Sequence[tuple[int, str]], used: set[str]) -> list[Any]:
    """The images of image_2, image_3, ... behind the one of `image`. used: gets the names.

    Raises:
        UserError: where the numbers do not go on from 2.
    """
    if not numbered:
        return []
    if name != "image" or [number for number, _ in numbered] != list(range(2, len(numbered) + 2)):
        raise UserError(
            f"the fields {name} and {numbered[0][1]} both name images: say which, --columns ignore={numbered[0][1]}."
        )
    used.update(other for _, other in numbered)
    return [image for _, other in numbered for image in as_list(row[other])]


def row_videos(row: dict[str, Any], used: set[str]) -> list[Any]:
    """The videos that stand beside a row's texts, each a file, a folder or a list of frames. used: gets the names.

    Raises:
        UserError: where several fields name videos.
    """
    names = [name for name in (*VIDEOS, *OTHER_VIDEOS) if not is_empty(row.get(name)) and is_video(name, row[name])]
    if len(names) > 1:
        raise UserError(f"the fields {', '.join(names)} all name videos: say which, --columns video={names[0]}.")
    used.update(name for name in VIDEOS if name not in row or is_empty(row[name]) or name in names)
    used.update(names)
    if not names:
        return []
    value = row[names[0]]
    if isinstance(value, (list, tuple)) and all(is_frame(own) for own in value):
        return [value]  # frames of one video
    return as_list(value)


def is_video(name: str, value: Any) -> bool:
    """Whether a field that may hold videos does: a number or a flag is none."""
    return name in VIDEOS or not isinstance(value, (bool, int, float))


def is_frame(value: Any) -> bool:
    """Whether a value is an image, and not a video or a list of frames."""
    return not isinstance(value, (list, tuple)) and (not isinstance(value, (str, dict)) or media_kind(value) == "image")


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_other_fields(
    row: dict[str, Any], used: set[str], unused: UnusedFields, *, has_images: bool, has_videos: bool = False
) -> None:
    """Refuses fields that change a row's meaning and are not used; counts the others.

    Raises:
        UserError: naming the field, and what to do.
    """
    for name, value in row.items():
        if name in used or is_empty(value):
            continue
        kind = media_kind(value)
        if MEDIA.search(name) and (kind or not isinstance(value, (bool, int, float, str)) or MEDIA.fullmatch(name)):
            kind = kind or ("audio" if re.search("audio|speech|sound", name, re.IGNORECASE) else "video")
        if kind == "video":
            raise UserError(
                f"the field '{name}' holds video, and videos are read from 'video' or 'videos': --columns video={name}, or "
                f"--columns ignore={name}."
            )
        if kind == "audio":
            raise UserError(
                f"the field '{name}' holds audio, which cannot be trained here: leave it out, --columns ignore={name}."
            )
        if name in TOOLS:
            raise UserError(
                f"the field '{name}' holds tools, which are not written into the prompt: put them into the system prompt's text, or leave "
                f"them out, --columns ignore={name}."
            )
        beside = has_images and isinstance(value, str)  # where the image came from, more often than one to be learned
        if kind == "image" and not beside and name not in METADATA:
            raise UserError(
                f"the field '{name}' holds an image, and no field that is read as one is there: --columns image={name}, or "
                f"--columns ignore={name}."
                if not has_images
                else f"the field '{name}' holds an image beside those that are read: put them into one list 'images', or "
                f"--columns ignore={name}."
            )
        if SYSTEM_WORD.fullmatch(name) and isinstance(value, str):
            raise UserError(
                f"the field '{name}' looks like a system prompt: --columns system={name}, or --columns ignore={name}."
            )
        if ROW_LOSS.fullmatch(name):
            raise UserError(
                f"the field '{name}' says how much the row counts: give each turn a 'weight' instead, or --columns ignore={name}."
            )
        if has_videos and PART_OF_VIDEO.fullmatch(name) and isinstance(value, (int, float)):
            raise UserError(
                f"the field '{name}' names a part of the video, and all of it is read: cut it before, or --columns ignore={name}."
            )
        if name not in METADATA:
            unused.add([name])


def check_no_preference(row: dict[str, Any]) -> None:
    """Raises UserError for a row that says which of two answers is the better."""
    for name, value in row.items():
        if not is_empty(value) and (PREFERENCE.search(str(name)) or (name == "label" and isinstance(value, bool))):
            raise UserError(f"the field '{name}' {PREFERENCE_ADVICE}")


def media_kind(value: Any) -> str:
    """'image', 'video' or 'audio', by what a value holds; '' for anything else."""
    if isinstance(value, (list, tuple)):
        return next((kind for own in value[:4] if (kind := media_kind(own))), "")
    if isinstance(value, dict):
        return next((kind for key in ("bytes", "path", "url") if (kind := media_kind(value.get(key)))), "")
    if isinstance(value, (bytes, bytearray)):
        return "image" if bytes(value[:4]).startswith(IMAGE_STARTS) else ""
    if not isinstance(value, str) or len(value) > 4096:
        return ""
    word = value.split("?")[0].strip()
    if VIDEO_FILE.search(word):
        return "video"
    if AUDIO_FILE.search(word):
        return "audio"
    return (
        "image"
        if (IMAGE_FILE.search(word) and not re.search(r"\s\w+\s", word)) or word.startswith("data:image/")
        else ""
    )


def turn_weight(turn: dict[str, Any]) -> float | None:
    """How much an answer counts, by the flag of its turn; None where it has none.

    Raises:
        UserError: for what is no number of 0 or more, and for flags that contradict one another.
    """
    found: dict[str, float] = {}
    for name in TURN_WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= float(value) < float("inf"):
            raise UserError(f"a turn's '{name}' must be true, false or a weight of 0 or more, not {value!r}.")
        found[name] = float(value)
    if len(set(found.values())) > 1:
        raise UserError(f"a turn's flags contradict one another: {', '.join(f'{k} {v:g}' for k, v in found.items())}.")
    return next(iter(found.values()), None)


def plain_text(value: Any, what: str) -> str:
    """A text, or a number as one.

    Raises:
        UserError: for anything else, which would be learned as Python writes it.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found = str(value).lower() if isinstance(value, bool) else f"of type {type(value).__name__}"
        raise UserError(f"{what} must be a text, not {found}: write it as the model shall see or say it.")
    return str(value)
