"""Conversations about images, read from the rows that people have.

    LLaVA     {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
    ShareGPT  the same with "images": ["a.jpg", "b.jpg"], and "system": "..."
    chat      {"messages": [{"role": "user", "content": "..." or [{"type": "image", ...}, {"type": "text", "text": ...}]}], "images": [...]}
    pairs     {"image": "a.jpg", "question": "What is it?", "answer": "a cat"}; also query/response, prompt/completion, and Alpaca's
              instruction, input and output; with "choices", or with "history": [["question", "answer"], ...]
    boxes     "objects": {"ref": ["cat"], "bbox": [[3, 4, 20, 25]]} for the marks <ref-object> and <bbox> in the texts
    videos    "video": "a.mp4", or a list of frames, for the mark <video>; "videos" for several

row_files.py reads the files, row_fields.py says which fields there are. Whatever the row says, it becomes chat messages whose content is
a list of {"type": "image"}, {"type": "video"} and {"type": "text", "text": ...}, and its images and videos in the order of those blocks.
Texts stay as they are, to the last blank; only the line break between a mark at the edge of a message and the text beside it belongs
to the mark.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from . import row_fields
from .choices import choice_letter, choice_question, read_choices
from .image_store import ImageStore
from .images import IMAGE_KEYS, parse_source
from .objects import fill_object_marks, parse_objects
from .row_fields import (
    UnusedFields,
    as_list,
    check_no_preference,
    check_other_fields,
    first_field,
    row_images,
    row_videos,
    turn_weight,
)
from .row_files import check_columns_met, read_rows, rename_columns
from .row_forms import settle_row
from .videos import VIDEO_KEYS, Medium, Video, parse_fps, parse_video

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # where one stands in a text
MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
NUMBERED_MARK = re.compile(r"<\|?image[ _]?(\d+)\|?>")  # MMMU's, Phi's: which image stands there
NAMED_IMAGE = re.compile(r"<img>([^<>\n]+\.\w{3,4})</img>")  # the first Qwen-VL's, with the image's path
FOREIGN_MARK = re.compile(
    rf"{NAMED_IMAGE.pattern.replace('(', '(?:', 1)}|<Image><ImageHere></Image>|<ImageHere>|<image_placeholder>"
    r"|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image_pad\|>|<\|begin_of_image\|><\|image\|><\|end_of_image\|>|<\|image\|>"
    r"|<start_of_image>|<image_soft_token>|<IMG_CONTEXT>|<IMAGE>|<Image>|\[IMG\]|^<img>(?=\r?\n)|(?<=\n)<img>$"
)
LETTERS_WITHOUT_IMAGES = ("<IMAGE>", "<Image>", "[IMG]", "<img>\n", "<img>\r")  # which a text about code may hold
MEDIA_MARK = re.compile(r"<(audio|speech)>")
OBJECT_MARK = re.compile(r"<(bbox|box|point|ref-object)>")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
TEXT_BLOCKS, IMAGE_BLOCKS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
VIDEO_BLOCKS = ("video", "video_url", "input_video")
MEDIA_TYPES = ("image", "video")  # of blocks
THOUGHT_BLOCKS = ("thinking", "reasoning")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One row: messages as chat templates take them, and their images and videos."""

    messages: tuple[Message, ...]
    images: tuple[Medium, ...]
    """Images and videos, in the order of their blocks."""
    location: str
    """Where it stands, for errors: 'data.json, row 3'."""
    weights: tuple[float, ...] = ()
    """How much each message counts in the loss; empty means that every answer counts 1."""

    def until(self, count: int) -> Conversation:
        """Its first `count` messages, with their images."""
        messages = self.messages[:count]
        images = sum(part["type"] in MEDIA_TYPES for message in messages for part in message["content"])
        return replace(self, messages=messages, images=self.images[:images], weights=self.weights[:count])

    def weight(self, number: int) -> float:
        """How much a message counts in the loss."""
        return self.weights[number] if self.weights else float(self.messages[number]["role"] == "assistant")

    def learn_only(self, number: int) -> Conversation:
        """The conversation up to message `number`, of which alone something is learned."""
        return replace(self.until(number + 1), weights=(*[0.0] * number, self.weight(number)))


@dataclass(frozen=True)
class ConversationFile:
    """What a data file gave."""

    rows: list[Conversation]
    faults: list[str]
    """One sentence for each row that was left out."""
    unused: UnusedFields = field(default_factory=UnusedFields)
    """Fields that are not used."""


def read_conversations(
    file: Path,
    images: Path | None = None,
    *,
    skip_bad: bool = False,
    columns: Sequence[str] = (),
    split: str = "",
    learn: str = "all",
) -> ConversationFile:
    """All conversations of a file.

    images: what images' paths start from, by default the file's own folder; skip_bad: leave out rows that cannot be used, instead of
    stopping at the first; columns: see `rename_columns`; split: of a folder that holds several; learn: 'all' answers, the 'last', or
    those whose turns are 'marked'.

    Raises:
        UserError: naming the file, and line and column or the row, of what is wrong.
    """
    file = Path(file)
    if not file.exists() and "*" not in file.name:
        raise UserError(f"--data {file} does not exist.")
    images = Path(images or data_folder(file, split))
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder.")
    rows: list[Conversation] = []
    faults: list[str] = []
    unused, seen, store = UnusedFields(), set[str](), ImageStore()
    for place, row in read_rows(file, split=split):
        try:
            parsed = parse_conversation(rename_columns(row, columns, seen), images, place, unused, learn=learn)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{place}: {error} (--skip-bad leaves such rows out.)") from error
            faults.append(f"{place}: {error}")
            continue
        rows.append(replace(parsed, images=store.keep_all(parsed.images)))
    check_columns_met(columns, seen, file)
    if not rows:
        raise UserError(f"{file}: none of its {len(faults)} rows can be used. {faults[0] if faults else ''}".strip())
    return ConversationFile(rows, faults, unused)


def data_folder(file: Path, split: str = "") -> Path:
    """The folder that images' paths start from where none is given: of the data file, or of the table in a folder of images."""
    from .row_files import METADATA, data_files

    if file.is_dir():
        found = data_files(file, split)
        return found[0].parent if found[0].name in METADATA else file
    return file.parent


# ---------------------------------------------------------------------------------------------- rows


@dataclass
class Turns:
    """The messages of a row while it is read."""

    messages: list[Message] = field(default_factory=list)
    weights: list[float | None] = field(default_factory=list)
    """By the flags of their turns; None where there is none."""
    inline: list[Any] = field(default_factory=list)
    """Images that stand within messages."""
    inline_videos: list[Any] = field(default_factory=list)
    """Videos that do."""


def parse_conversation(
    row: Any, images: Path, location: str, unused: UnusedFields | None = None, *, learn: str = "all"
) -> Conversation:
    """A row of any of the formats. unused: counts the fields that are not used.

    Raises:
        UserError: a sentence that says what is wrong with the row, without its place.
    """
    if not isinstance(row, dict):
        raise UserError(f"the row must be an object, not {type(row).__name__}.")
    unused = UnusedFields() if unused is None else unused
    used: set[str] = set()
    row = settle_row(row)
    check_no_preference(row)
    turns = parse_messages(row, used, unused)
    given, videos = row_images(row, used), row_videos(row, used)
    rate = parse_fps(row.get(row_fields.FPS)) if videos or turns.inline_videos else None
    objects = parse_objects(row, used)
    has_videos = bool(videos or turns.inline_videos)
    has_images = bool(given or turns.inline or has_videos)
    check_other_fields(row, used, unused, has_images=has_images, has_videos=has_videos)
    for beside, inside, what in ((given, turns.inline, "images"), (videos, turns.inline_videos, "videos")):
        if beside and inside:
            raise UserError(f"{what} stand both in the messages and beside them: keep one of the two.")
    given, videos = turns.inline or given, turns.inline_videos or videos
    given = order_numbered_images(turns.messages, read_foreign_marks(turns.messages, given))
    messages = fill_object_marks(turns.messages, objects)
    check_marks(messages)
    check_turns(messages)
    place_media(messages, {"image": len(given), "video": len(videos)})
    found = {
        "image": iter([parse_source(value, images) for value in given]),
        "video": iter([parse_video(value, images, rate) for value in videos]),
    }
    parts = [part["type"] for message in messages for part in message["content"] if part["type"] in MEDIA_TYPES]
    sources: tuple[Medium, ...] = tuple(next(found[kind]) for kind in parts)
    if rate is not None and any(isinstance(one, Video) and isinstance(one.source, tuple) for one in sources):
        used.add(row_fields.FPS)
    elif rate is not None:  # a file says its own
        unused.add([row_fields.FPS])
    return Conversation(tuple(messages), sources, location, message_weights(messages, turns.weights, learn))


def place_media(messages: Sequence[Message], counts: dict[str, int]) -> None:
    """Puts images and videos that no mark places before the first question. counts: how many a row has of each kind.

    Raises:
        UserError: when there are marks, and not as many.
    """
    unplaced: list[Message] = []
    for kind, mark in (("image", IMAGE_MARK), ("video", VIDEO_MARK)):
        marks = sum(part["type"] == kind for message in messages for part in message["content"])
        if counts[kind] and not marks:
            unplaced += [{"type": kind}] * counts[kind]
        elif marks != counts[kind]:
            raise UserError(f"there are {marks} marks {mark} for {counts[kind]} {kind}s.")
    first = next(message for message in messages if message["role"] == "user")
    first["content"][:0] = unplaced


def message_weights(messages: Sequence[Message], flags: Sequence[float | None], learn: str) -> tuple[float, ...]:
    """How much each message counts; () when every answer counts 1.

    Raises:
        UserError: when nothing is learned.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    weights = [0.0] * len(messages)
    for number in answers:
        flag = flags[number]
        if learn == "marked":
            weights[number] = flag or 0.0
        else:
            weights[number] = (1.0 if flag is None else flag) * (learn == "all" or number == answers[-1])
    if not any(weights):
        raise UserError("nothing of the row is learned: every answer is marked as not to be, or none is marked.")
    return () if all(weights[number] == 1 for number in answers) else tuple(weights)


def parse_messages(row: dict[str, Any], used: set[str], unused: UnusedFields) -> Turns:
    """The messages of a row, their flags, and the images that stand within them."""
    turns = Turns()
    name = first_field(row, [*row_fields.CONVERSATIONS, *row_fields.PAIRS], "conversation")
    name = name or next((own for own in (*row_fields.CONVERSATIONS, *row_fields.PAIRS) if own in row), None)
    asked = first_field(row, row_fields.QUESTIONS, "question")
    if name and asked and not row_fields.is_empty(row[name]):
        raise UserError(
            f"the row has both '{name}' and '{asked}': leave one out, --columns ignore={asked} or ignore={name}."
        )
    if asked or (name is None and "question" in row):
        parse_pair(row, asked or "question", used, unused, turns)
    elif name is None:
        raise UserError(
            f"the row has none of the fields conversations, messages or question; it has {', '.join(map(str, row)) or 'nothing'}. Others "
            "are named with --columns, such as --columns question=Frage answer=Antwort."
        )
    else:
        used.add(name)
        parse_turns(turn_list(row, name), unused, turns)
    add_system(row, used, turns)
    return turns


def turn_list(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The turns of a field that holds a conversation."""
    if not isinstance(row[name], list) or not all(isinstance(turn, dict) for turn in row[name]):
        raise UserError(f"the field {name} must be a list of objects, one per message.")
    if name not in row_fields.PAIRS:
        return row[name]
    turns = []
    for pair in row[name]:
        if not isinstance(pair.get("user"), str) or not isinstance(pair.get("assistant"), str):
            raise UserError(f"each entry of the field {name} must have a 'user' and an 'assistant', both texts.")
        turns += [{"role": "user", "content": pair["user"]}, {"role": "assistant", "content": pair["assistant"]}]
    return turns


def parse_pair(row: dict[str, Any], asked: str, used: set[str], unused: UnusedFields, turns: Turns) -> None:
    """A question with its answer, each a text, or (TRL's prompt and completion) lists of messages."""
    used.update((asked, *row_fields.HISTORY, *row_fields.CHOICES))
    answer_names = row_fields.ANSWERS[
        :2
    ]  # 'answers' and 'answer' may both be there: what several people said, and the chosen one
    answered = next((name for name in answer_names if not row_fields.is_empty(row.get(name))), None)
    others = first_field(row, row_fields.ANSWERS[2:], "answer")
    if answered and others:
        raise UserError(
            f"the row gives its answer twice, as '{answered}' and as '{others}': --columns ignore={others}."
        )
    used.update(answer_names)
    question, more = row[asked], row.get("input") if asked == "instruction" else None
    if asked == "instruction":
        used.update(row_fields.MORE_QUESTION)
    if isinstance(question, list) or (others and isinstance(row[others], list)):
        answers = answered or others
        if not answers:
            raise UserError("the row has a question and no answer.")
        used.add(answers)
        said = row[answers]
        both = [question if isinstance(question, list) else [{"role": "user", "content": question}]]
        both.append(said if isinstance(said, list) else [{"role": "assistant", "content": said}])
        if not all(isinstance(turn, dict) for part in both for turn in part):
            raise UserError(f"the fields {asked} and {answers} must be texts, or lists of messages.")
        parse_turns([turn for part in both for turn in part], unused, turns)
        return
    known = reference_answers(row)
    if others:
        used.add(others)
        known = [row_fields.plain_text(row[others], f"the field {others}")]
    if not known:
        raise UserError("the row has a question and no answer.")
    answer, options = commonest(known), read_choices(row)
    text = row_fields.plain_text(question, f"the field {asked}")
    text = f"{text}\n{row_fields.plain_text(more, 'the field input')}" if more else text
    if options:
        number = isinstance(row.get("answer"), int)
        text, answer = choice_question(text, options), choice_letter(answer, options, number=number)
    for pair in row.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError("the field history must be a list of [question, answer].")
        parse_turns([{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}], unused, turns)
    parse_turns([{"role": "user", "content": text}, {"role": "assistant", "content": answer}], unused, turns)


def commonest(answers: Sequence[str]) -> str:
    """The answer that most gave, the first of them on a tie."""
    counts = Counter(answers)
    return max(answers, key=lambda answer: counts[answer])


def reference_answers(row: dict[str, Any]) -> list[str]:
    """The right answers of a row with a question: of `answers` (texts, or objects with an `answer`), or of `answer`.

    Raises:
        UserError: for what is neither text nor a number, and for a list of numbers, which may be one answer or several.
    """
    name = "answers" if "answers" in row else "answer"
    given = row.get(name)
    if name == "answer" and isinstance(given, list) and any(isinstance(one, (int, float)) for one in given):
        raise UserError(f"the answer is a list of numbers, {str(given)[:80]}: write it as the text that shall be said.")
    given = given if isinstance(given, list) else [] if row_fields.is_empty(given) else [given]
    said = [one["answer"] if isinstance(one, dict) and "answer" in one else one for one in given]
    return [row_fields.plain_text(one, f"the field {name}") for one in said]


def add_system(row: dict[str, Any], used: set[str], turns: Turns) -> None:
    """Puts the system prompt that stands in a field of its own in front."""
    name = first_field(row, row_fields.SYSTEM, "system prompt")
    used.update(row_fields.SYSTEM)
    if name is None:
        return
    content = parse_content(row[name], Turns(), UnusedFields())
    if any(part["type"] in MEDIA_TYPES for part in content):
        raise UserError(f"the field '{name}' holds an image or a video: those belong to questions.")
    if turns.messages and turns.messages[0]["role"] == "system":
        if turns.messages[0]["content"] != content:
            raise UserError(f"the row has two system prompts, in '{name}' and as its first message: leave one out.")
        return
    turns.messages.insert(0, {"role": "system", "content": content})
    turns.weights.insert(0, None)


def parse_turns(given: Sequence[dict[str, Any]], unused: UnusedFields, turns: Turns) -> None:
    """Appends turns as messages."""
    known = (
        *row_fields.TURN_ROLES,
        *row_fields.TURN_TEXTS,
        *row_fields.TURN_IMAGES,
        *row_fields.TURN_WEIGHTS,
        *row_fields.TURN_THOUGHTS,
    )
    for turn in given:
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = role.strip().lower() if isinstance(role, str) else role
        calls = [name for name in row_fields.TURN_CALLS if not row_fields.is_empty(turn.get(name))]
        if calls or role in TOOL_ROLES:
            what = f"field '{calls[0]}'" if calls else f"role '{role}'"
            raise UserError(
                f"a turn has the {what}: calls of tools cannot be learned here; write them as text, or leave them out."
            )
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"the role '{role}' is unknown; known are {', '.join(ROLES)}.")
        for name, value in turn.items():
            if name in known or row_fields.is_empty(value):
                continue
            if (kind := row_fields.media_kind(value)) or row_fields.MEDIA.search(name):
                raise UserError(
                    f"a turn has the field '{name}', which holds {kind or 'media'} and cannot be used there."
                )
            if row_fields.PREFERENCE.search(name):
                raise UserError(f"a turn's field '{name}' {row_fields.PREFERENCE_ADVICE}")
            if row_fields.TURN_LOSS.search(name):
                raise UserError(
                    f"a turn's field '{name}' says what is learned by a name that is not known: call it 'loss' (true, false, or a weight)."
                )
            unused.add([name], "turn")
        blocks = parse_content(content, turns, unused)
        own = [image for name in row_fields.TURN_IMAGES if name in turn for image in as_list(turn[name])]
        if own:
            marks = sum(part["type"] == "image" for part in blocks)
            if marks not in (0, len(own)):
                raise UserError(f"a turn has {marks} marks {IMAGE_MARK} for its {len(own)} images.")
            blocks = [*[{"type": "image"}] * (len(own) if not marks else 0), *blocks]
            turns.inline += own
        if thought := next((turn[name] for name in row_fields.TURN_THOUGHTS if turn.get(name)), None):
            blocks = [{"type": "text", "text": f"<think>\n{str(thought).strip()}\n</think>\n\n"}, *blocks]
        weight = turn_weight(turn)
        if weight is not None and ROLES[role] != "assistant":
            unused.add([name for name in row_fields.TURN_WEIGHTS if turn.get(name)], "question's turn")
            weight = None
        turns.messages.append({"role": ROLES[role], "content": blocks})
        turns.weights.append(weight)


def parse_content(content: Any, turns: Turns, unused: UnusedFields) -> list[dict[str, Any]]:
    """A message's content as blocks; images and videos named in blocks are appended to those of `turns`."""
    if isinstance(content, str):
        return split_marks(content)
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        content = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise UserError(f"a message's content must be text or a list of blocks, not {str(content)[:200]!r}."
                        if content is not None else "a message's content must be text or a list of blocks, not None.")  # fmt: skip
    parts: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type", "text" if "text" in block else None)
        if kind in TEXT_BLOCKS:
            name = next((own for own in ("text", "content", "value") if own in block), None)
            if name is None:
                raise UserError("a block of text has no 'text'.")
            parts += split_marks(row_fields.plain_text(block[name], "a block's text"))
            block = {key: value for key, value in block.items() if key != name}
        elif kind in THOUGHT_BLOCKS:
            parts.append({"type": "text", "text": f"<think>\n{str(block.get(kind, '')).strip()}\n</think>\n\n"})
            continue
        elif kind in IMAGE_BLOCKS:
            parts.append({"type": "image"})
            if isinstance(block.get("source"), dict):  # Anthropic's
                source = block["source"]
                turns.inline.append({"base64": source["data"]} if "data" in source else source)
            elif set(block) & set(IMAGE_KEYS):
                turns.inline.append({key: value for key, value in block.items() if key in IMAGE_KEYS})
        elif kind in VIDEO_BLOCKS:
            parts.append({"type": "video"})
            if set(block) & set(VIDEO_KEYS):
                turns.inline_videos.append(block)
        else:
            raise UserError(f"a block of type '{kind}' cannot be used: known are text, image and video.")
        unused.add(unused_block_fields(block, kind), "block")
    return parts


def unused_block_fields(block: dict[str, Any], kind: str) -> list[str]:
    """Fields of a block that say nothing here; a video file says its frames per second itself."""
    known = (*IMAGE_KEYS, *row_fields.BLOCK_FIELDS)
    if kind in VIDEO_BLOCKS:
        if part := next((name for name in block if row_fields.PART_OF_VIDEO.fullmatch(name)), None):
            raise UserError(
                f"a video's block has '{part}', which names a part of it, and all of it is read: cut it before."
            )
        frames = any(isinstance(block.get(name), (list, tuple)) for name in VIDEO_KEYS)
        known = (*row_fields.BLOCK_FIELDS, *VIDEO_KEYS, *((row_fields.FPS,) if frames else ()))
    return [name for name in block if name not in known]


def split_marks(text: str) -> list[dict[str, Any]]:
    """A text with marks as blocks."""
    split = MARKS.split(text)
    pieces, marks = split[::2], split[1::2]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image" if marks[number - 1] == IMAGE_MARK else "video"})
            before = all(not own.strip() for own in pieces[:number])
            piece = piece.removeprefix("\r").removeprefix("\n") if before else piece
        if number < len(pieces) - 1 and all(not own.strip() for own in pieces[number + 1 :]):
            piece = piece.removesuffix("\n").removesuffix("\r")
        if piece and (piece.strip() or len(pieces) == 1):
            parts.append({"type": "text", "text": piece})
    return parts


def read_foreign_marks(messages: list[Message], given: list[Any]) -> list[Any]:
    """Marks of other tools in questions become blocks, where no mark of ours is; returns the images, also those that marks name.

    Raises:
        UserError: when there are marks, and not as many as images.
    """
    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    if any(part["type"] == "image" for part in parts):
        return given
    found = [match for part in parts for match in FOREIGN_MARK.finditer(part.get("text", ""))]
    if not given:
        found = [match for match in found if not match[0].strip().startswith(LETTERS_WITHOUT_IMAGES)]
    if not found:
        return given
    named = [path[1] for match in found if (path := NAMED_IMAGE.fullmatch(match[0]))]
    images = given or named
    if len(found) != len(images):
        raise UserError(
            f"a question holds the mark {found[0][0].strip()}, of which there are {len(found)} for {len(images)} images: write <image> "
            "where each stands."
        )
    for message in messages:
        if message["role"] == "user":
            message["content"] = [
                block
                for part in message["content"]
                for block in (
                    split_marks(FOREIGN_MARK.sub(IMAGE_MARK, part["text"])) if part["type"] == "text" else [part]
                )
            ]
    return images


def order_numbered_images(messages: list[Message], given: list[Any]) -> list[Any]:
    """The images in the order of marks that say which one stands there, as <image 2>; such marks become blocks.

    Raises:
        UserError: when such a mark names an image that is not there, or marks do not name each image once.
    """
    if not given:
        return given
    found: list[int] = []
    for message in messages:
        if message["role"] != "user":
            continue
        parts = []
        for part in message["content"]:
            pieces = NUMBERED_MARK.split(part.get("text", "")) if part["type"] == "text" else []
            if len(pieces) < 3:
                parts.append(part)
                continue
            for number, piece in enumerate(pieces):
                if number % 2:
                    found.append(int(piece))
                    parts.append({"type": "image"})
                elif piece.strip():
                    parts.append({"type": "text", "text": piece})
        message["content"] = parts
    if not found:
        return given
    if sorted(found) != list(range(1, len(given) + 1)):
        raise UserError(
            f"its marks name the images {', '.join(map(str, found))}, and it has {len(given)}: each must be named once, from 1."
        )
    return [given[number - 1] for number in found]


def check_marks(messages: Sequence[Message]) -> None:
    """Raises UserError when a question holds a mark for something that is not there."""
    for message in messages:
        for part in message["content"]:
            text = part.get("text", "")
            if message["role"] == "user" and (match := MEDIA_MARK.search(text)):
                raise UserError(f"a question holds the mark {match[0]}: {match[1]} cannot be trained here.")
            if match := OBJECT_MARK.search(text):
                raise UserError(f"a text holds the mark {match[0]}, and the field 'objects' has nothing left for it.")


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
            if any(part["type"] in MEDIA_TYPES for part in message["content"]):
                raise UserError("an answer holds an image or a video, which a model that answers in text cannot learn.")
            if not any(part["text"].strip() for part in message["content"]):
                raise UserError("an answer is empty.")
        elif not any(part["type"] in MEDIA_TYPES or part["text"].strip() for part in message["content"]):
            raise UserError("a question is empty.")
    if len(turns) % 2:
        raise UserError("the last question has no answer.")
