"""Questions with right answers: read from files, shown with other images, written as other harnesses read them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.randomness import permutation
from ...toolkit.data.conversations import (
    Conversation,
    parse_conversation,
    read_conversations,
    read_rows,
    reference_answers,
)
from ...toolkit.data.images import ImageSource, load_rgb
from ...toolkit.metrics import answers as scoring

SHORT_INSTRUCTION = "Answer the question using a single word or phrase."  # LLaVA-1.5's words
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question with its right answer."""

    conversation: Conversation
    question: str
    """Its words, without the options."""
    kind: str
    """vqa, yesno or mcq."""
    references: tuple[str, ...]
    """Right answers; for mcq the letter."""
    options: tuple[str, ...]
    split: str
    """Such as POPE's random, popular and adversarial; '' when there is none."""
    cluster: str
    """What the image is, by its content."""

    def parse_answer(self, text: str) -> str | None:
        """What was said, None when it cannot be read."""
        if self.kind == "yesno":
            return scoring.read_yesno(text)
        if self.kind == "mcq":
            return scoring.read_choice(text, self.options)
        return scoring.normalize_or_keep(text) or None

    def score(self, said: str | None) -> float:
        """0 to 1."""
        if said is None:
            return 0.0
        return scoring.vqa_score(said, self.references) if self.kind == "vqa" else float(said == self.references[0])


def read_items(file: Path, images: Path | None, *, ask_short: bool = False) -> list[Item]:
    """The questions of a file of {"image", "question", "answer" or "answers" or "choices" and "answer", "type", "split"}, or of any file
    of conversations, whose first questions are then asked. ask_short: with LLaVA's instruction for short answers appended.

    Raises:
        UserError: for a row that cannot be used.
    """
    if next((isinstance(row, dict) and "question" in row for _, row in read_rows(Path(file))), False):
        folder = Path(images or Path(file).parent)
        return [parse_item(row, folder, place, ask_short) for place, row in read_rows(Path(file))]
    return [item_from_conversation(row, ask_short) for row in read_conversations(file, images).rows]


def parse_item(row: Any, images: Path, place: str, ask_short: bool) -> Item:
    """One row of questions."""
    if not isinstance(row, dict) or "question" not in row:
        raise UserError(f"{place}: the row has no question.")
    references = reference_answers(row)
    if not references:
        raise UserError(f"{place}: the row has no answer.")
    options = tuple(str(option) for option in row.get("choices", ()))
    if len(options) > len(scoring.LETTERS):
        raise UserError(f"{place}: {len(options)} choices are more than the {len(scoring.LETTERS)} that have letters.")
    polar = {answer.strip(" .").lower() for answer in references}
    kind = str(row.get("type") or ("mcq" if options else "yesno" if polar <= {"yes", "no"} else "vqa"))
    if kind not in ("vqa", "yesno", "mcq"):
        raise UserError(f"{place}: the type '{kind}' is none of vqa, yesno, mcq.")
    if kind == "mcq":
        references = [answer_letter(references[0], options, place)]
    elif kind == "yesno":
        if not polar <= {"yes", "no"}:
            raise UserError(
                f"{place}: the answer to a question of type yesno must be yes or no, not '{references[0]}'."
            )
        references = [Counter(answer.strip(" .").lower() for answer in references).most_common(1)[0][0]]
    question = str(row["question"])
    try:
        given = {key: row[key] for key in ("image", "images") if key in row}
        words = question_text(question, kind, options, ask_short)
        asked = parse_conversation(given | {"question": words, "answer": references[0]}, images, place).until(1)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    split = str(row.get("split", row.get("category", "")))
    return Item(asked, question, kind, tuple(references), options, split, image_cluster(asked))


def item_from_conversation(row: Conversation, ask_short: bool) -> Item:
    """The first question of a conversation."""
    start = row.messages[0]["role"] == "system"
    asked = row.until(1 + start)
    answer = " ".join(part["text"] for part in row.messages[1 + start]["content"])
    kind = "yesno" if answer.strip(" .").lower() in ("yes", "no") else "vqa"
    if ask_short:
        message = asked.messages[-1]
        more = {"role": "user", "content": [*message["content"], {"type": "text", "text": SHORT_INSTRUCTION}]}
        asked = replace(asked, messages=(*asked.messages[:-1], more))
    answer = answer.strip(" .").lower() if kind == "yesno" else answer
    words = " ".join(part["text"] for part in asked.messages[-1]["content"] if part["type"] == "text")
    return Item(asked, words, kind, (answer,), (), "", image_cluster(asked))


def question_text(question: str, kind: str, options: Sequence[str], ask_short: bool) -> str:
    """The words that are put to the model."""
    if kind == "mcq":
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(scoring.LETTERS, options, strict=False))
        return f"{question}\n{listed}\n{LETTER_INSTRUCTION}"
    return f"{question}\n{SHORT_INSTRUCTION}" if ask_short else question


def answer_letter(answer: str, options: Sequence[str], place: str) -> str:
    """The letter of the right option, given as letter, or as its text."""
    letters = scoring.LETTERS[: len(options)]
    if answer in options:
        return letters[options.index(answer)]
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    raise UserError(f"{place}: the answer '{answer}' is none of the choices.")


def image_cluster(row: Conversation) -> str:
    """The row's images by their content; a row without one is its own cluster."""
    if not row.images:
        return row.location
    return hashlib.sha256(b"".join(image_bytes(image) for image in row.images)).hexdigest()


def image_bytes(image: ImageSource) -> bytes:
    """An image's bytes."""
    return image.read_bytes() if isinstance(image, Path) else image


# ---------------------------------------------------------------------------------------------- other images


def replace_images(items: Sequence[Item], change: Callable[[int], Sequence[ImageSource]]) -> list[Item]:
    """The items with other images."""
    return [
        replace(item, conversation=replace(item.conversation, images=tuple(change(n)))) for n, item in enumerate(items)
    ]


def blank_images(items: Sequence[Item]) -> list[Item]:
    """The items with grey images of the same sizes."""

    def grey_image(image: ImageSource) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", load_rgb(image).size, (128, 128, 128)).save(buffer, format="png")
        return buffer.getvalue()

    return replace_images(items, lambda n: [grey_image(image) for image in items[n].conversation.images])


def shuffle_images(items: Sequence[Item], seed: int) -> list[Item]:
    """The items with the images of another item that has as many; an item whose like is nowhere keeps its own."""
    others: dict[int, list[int]] = {}
    for number, item in enumerate(items):
        others.setdefault(len(item.conversation.images), []).append(number)
    source = list(range(len(items)))
    for group in others.values():
        mixed = [group[i] for i in permutation(seed, len(group), 0)]
        for at, number in enumerate(mixed):
            turn = [mixed[(at + step) % len(mixed)] for step in range(1, len(mixed))]
            source[number] = next((n for n in turn if items[n].cluster != items[number].cluster), number)
    return replace_images(items, lambda n: items[source[n]].conversation.images)


def count_leaked(items: Sequence[Item], training: Sequence[Conversation]) -> int:
    """Items whose images were trained on."""
    known = {hashlib.sha256(image_bytes(image)).hexdigest() for row in training for image in row.images}
    return sum(
        any(hashlib.sha256(image_bytes(p)).hexdigest() in known for p in item.conversation.images) for item in items
    )


# ---------------------------------------------------------------------------------------------- other harnesses


def write_vlmevalkit(items: Sequence[Item], path: Path) -> Path:
    """The items as a table that VLMEvalKit reads (tab-separated, images in base64).

    Raises:
        UserError: for a row without exactly one image, which its tables do not have.
    """
    buffer = io.StringIO()
    most = max(len(item.options) for item in items)
    table = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    table.writerow(["index", "image", "question", *scoring.LETTERS[:most], "answer", "category"])
    for number, item in enumerate(items):
        if len(item.conversation.images) != 1:
            raise UserError(
                f"{item.conversation.location}: VLMEvalKit's tables hold one image per row, not {len(item.conversation.images)}."
            )
        image = base64.b64encode(image_bytes(item.conversation.images[0])).decode()
        options = [*item.options, *[""] * (most - len(item.options))]
        table.writerow([number, image, item.question, *options, item.references[0], item.split])
    write_text(path, buffer.getvalue())
    return path
