"""Questions with right answers: read from files, shown with other images, written as other harnesses read them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.randomness import permutation
from ...toolkit.data.choices import choice_letter, choice_question, read_choices
from ...toolkit.data.conversations import Conversation, data_folder, parse_conversation, reference_answers
from ...toolkit.data.image_checks import PlanMemory, check_images
from ...toolkit.data.image_store import ImageStore
from ...toolkit.data.images import ImageSource, image_size, load_rgb
from ...toolkit.data.row_fields import UnusedFields
from ...toolkit.data.row_files import check_columns_met, read_rows, rename_columns
from ...toolkit.data.row_forms import settle_row
from ...toolkit.data.videos import Medium, Video, load_clip, medium_bytes
from ...toolkit.metrics import answers as scoring
from ...toolkit.vlm.grounding import iou
from ...toolkit.vlm.model import VisionLanguageModel

MIN_IOU = 0.5  # from which a box is right
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."  # LLaVA-1.5's words


@dataclass(frozen=True)
class Item:
    """One question with its right answer."""

    conversation: Conversation
    question: str
    """Its words, without the options."""
    kind: str
    """vqa, yesno, mcq, or box: the first place in the answer, right from an intersection over union of 0.5."""
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
        if self.kind == "box":
            return text or None
        return scoring.normalize_or_keep(scoring.strip_thoughts(text)) or None

    def score(self, said: str | None) -> float:
        """0 to 1."""
        if said is None:
            return 0.0
        if self.kind == "box":
            return float(self.iou(said) >= MIN_IOU)
        return scoring.vqa_score(said, self.references) if self.kind == "vqa" else float(said == self.references[0])

    def iou(self, said: str) -> float:
        """How much a box that was said is the right one."""
        return iou(box_numbers(self.references[0]), box_numbers(said))

    def place(self, text: str, vision: VisionLanguageModel) -> str:
        """The box of an answer in pixels of the item's first image, '' where there is none; other kinds' answers as they are."""
        if self.kind != "box":
            return text
        found = vision.chat.grounding.read(text, image_size(first_image(self.conversation)))
        return " ".join(f"{number:.2f}" for number in found or ())


@dataclass
class ItemFile:
    """What a file of questions gave."""

    items: list[Item] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """One sentence for each row that was left out."""
    unused: UnusedFields = field(default_factory=UnusedFields)
    store: ImageStore = field(default_factory=ImageStore)
    indices: int = 0
    """Answers that were read as the index of an option, from 0."""

    def describe(self) -> list[str]:
        """What is asked and what is not, in lines."""
        lines = [f"{len(self.items)} questions"]
        lines += [f"left out {fault}" for fault in self.faults[:5]]
        if len(self.faults) > 5:
            lines.append(f"left out {len(self.faults) - 5} more")
        if self.indices:
            lines.append(f"{self.indices} answers are numbers, read as the index of the right option, from 0")
        return lines + ([self.unused.describe()] if self.unused.counts else [])


def first_image(row: Conversation) -> ImageSource:
    """The image that boxes are of."""
    return next(medium for medium in row.images if not isinstance(medium, Video))


def box_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a box as items keep them, in pixels of the image."""
    return tuple(float(number) for number in text.split())


def read_items(file: Path, images: Path | None, *, ask_short: bool = False) -> list[Item]:
    """The questions of a file, see `read_item_file`."""
    return read_item_file(file, images, ask_short=ask_short).items


def read_item_file(
    file: Path,
    images: Path | None,
    *,
    ask_short: bool = False,
    columns: Sequence[str] = (),
    split: str = "",
    skip_bad: bool = False,
) -> ItemFile:
    """The questions of a file of {"image", "question", "answer" or "answers" or "choices" and "answer", "type", "split"}, or of any file
    of conversations, all of whose questions are asked, each after those before it with their right answers.

    ask_short: with LLaVA's instruction for short answers appended; columns: see `rename_columns`; skip_bad: leave out rows that cannot
    be used, instead of stopping at the first.

    Raises:
        UserError: for a row that cannot be used, an image that is not sound among them.
    """
    folder, found, seen, count = Path(images or data_folder(Path(file), split)), ItemFile(), set[str](), 0
    for place, row in read_rows(Path(file), split=split):
        count += 1
        try:
            found.items += row_items(rename_columns(row, columns, seen), folder, place, ask_short, found)
        except UserError as error:
            fault = str(error) if str(error).startswith(place) else f"{place}: {error}"
            if not skip_bad:
                raise UserError(fault) from error
            found.faults.append(fault)
    check_columns_met(columns, seen, Path(file))
    drop_faulty_images(Path(file), found, skip_bad=skip_bad)
    if not found.items:
        raise UserError(
            f"{file}: none of its {count} rows is a question that can be asked. {' '.join(found.faults[:1])}".strip()
        )
    return found


def row_items(row: Any, images: Path, place: str, ask_short: bool, found: ItemFile) -> list[Item]:
    """The questions of a row."""
    row = settle_row(row) if isinstance(row, dict) else row
    if isinstance(row, dict) and isinstance(row.get("question"), str) and not row.get("objects"):
        return [parse_item(row, images, place, ask_short, found)]
    return conversation_items(read_row(row, images, place, found), ask_short=ask_short)


def read_row(row: Any, images: Path, place: str, found: ItemFile) -> Conversation:
    """A row as a conversation, its images' bytes on disk where they would fill the memory."""
    parsed = parse_conversation(row, images, place, found.unused)
    return replace(parsed, images=found.store.keep_all(parsed.images))


def conversation_items(row: Conversation, *, ask_short: bool = False) -> list[Item]:
    """All questions of a conversation whose answers count, each after those before it with their right answers."""
    answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    return [item_from_conversation(row, number, ask_short) for number in answers if row.weight(number) > 0]


def drop_faulty_images(file: Path, found: ItemFile, *, skip_bad: bool) -> None:
    """Decodes every image, and refuses or drops the questions about those that are not sound."""
    memory = PlanMemory(file)
    checked = check_images((image for item in found.items for image in item.conversation.images), memory)
    memory.save()
    sound = []
    for item in found.items:
        fault = next((checked[image].fault for image in item.conversation.images if checked[image].fault), "")
        if fault and not skip_bad:
            raise UserError(f"{item.conversation.location}: {fault} (--skip-bad leaves such rows out.)")
        if fault:
            found.faults.append(f"{item.conversation.location}: {fault}")
        else:
            sound.append(item)
    found.items = sound


def parse_item(row: dict[str, Any], images: Path, place: str, ask_short: bool, found: ItemFile) -> Item:
    """One row of questions."""
    references = reference_answers(row)
    if not references:
        raise UserError(f"{place}: the row has no answer.")
    options = read_choices(row)
    polar = {answer.strip(" .").lower() for answer in references}
    kind = str(row.get("type") or ("mcq" if options else "yesno" if polar <= {"yes", "no"} else "vqa"))
    if kind not in ("vqa", "yesno", "mcq"):
        raise UserError(f"{place}: the type '{kind}' is none of vqa, yesno, mcq.")
    if kind == "mcq":
        number = isinstance(row.get("answer"), int)
        references = [choice_letter(references[0], options, number=number)]
        found.indices += number and str(row["answer"]) not in options
    elif kind == "yesno":
        if not polar <= {"yes", "no"}:
            raise UserError(
                f"{place}: the answer to a question of type yesno must be yes or no, not '{references[0]}'."
            )
        references = [Counter(answer.strip(" .").lower() for answer in references).most_common(1)[0][0]]
    question = str(row["question"])
    words = question_text(question, kind, options, ask_short)
    given = {key: value for key, value in row.items() if key not in ("answers", "answer", "choices", "options")}
    asked = read_row(given | {"question": words, "answer": references[0]}, images, place, found)
    asked = asked.until(len(asked.messages) - 1)
    split = str(row.get("split", row.get("category", "")))
    return Item(asked, question, kind, tuple(references), options, split, image_cluster(asked))


def item_from_conversation(row: Conversation, number: int, ask_short: bool) -> Item:
    """The question of a conversation whose answer is message `number`."""
    asked = row.until(number)
    answer = "".join(part["text"] for part in row.messages[number]["content"])
    answer = scoring.strip_thoughts(answer) or answer
    boxes = [part["box"] for part in row.messages[number]["content"] if "box" in part]
    if len(boxes) == 1 and boxes[0]["image"] == 0:
        return box_item(row, number, boxes[0])
    kind = "yesno" if answer.strip(" .").lower() in ("yes", "no") else "vqa"
    if ask_short:
        message = asked.messages[-1]
        more = {"role": "user", "content": [*message["content"], {"type": "text", "text": f"\n{SHORT_INSTRUCTION}"}]}
        asked = replace(asked, messages=(*asked.messages[:-1], more))
    answer = answer.strip(" .").lower() if kind == "yesno" else answer
    words = "".join(part["text"] for part in asked.messages[-1]["content"] if part["type"] == "text")
    return Item(asked, words, kind, (answer,), (), "", image_cluster(asked))


def box_item(row: Conversation, number: int, place: dict[str, Any]) -> Item:
    """The question of a conversation whose answer, message `number`, is one place in its first image."""
    width, height = image_size(first_image(row))
    unit = {"pixels": (1, 1), "relative": (width, height), "thousandths": (width / 1000, height / 1000)}[place["unit"]]
    right = " ".join(f"{own * unit[at % 2]:.2f}" for at, own in enumerate(place["numbers"]))
    asked = row.until(number)
    words = "".join(part["text"] for part in asked.messages[-1]["content"] if part["type"] == "text")
    return Item(asked, words, "box", (right,), (), "", image_cluster(asked))


def question_text(question: str, kind: str, options: Sequence[str], ask_short: bool) -> str:
    """The words that are put to the model."""
    if kind == "mcq":
        return choice_question(question, options)
    return f"{question}\n{SHORT_INSTRUCTION}" if ask_short else question


def image_cluster(row: Conversation) -> str:
    """The row's images by their content; a row without one is its own cluster."""
    if not row.images:
        return row.location
    return hashlib.sha256(b"".join(medium_bytes(medium) for medium in row.images)).hexdigest()


# ---------------------------------------------------------------------------------------------- other images


def replace_images(items: Sequence[Item], change: Callable[[int], Sequence[Medium]]) -> list[Item]:
    """The items with other images and videos."""
    return [
        replace(item, conversation=replace(item.conversation, images=tuple(change(n)))) for n, item in enumerate(items)
    ]


def blank_images(items: Sequence[Item]) -> list[Item]:
    """The items with grey images, and videos of grey frames, of the same sizes."""

    def grey(medium: Medium) -> Medium:
        if not isinstance(medium, Video):
            return encode_png(Image.new("RGB", load_rgb(medium).size, (128, 128, 128)))
        size = medium.size or load_clip(medium).size
        frame = encode_png(Image.new("RGB", (size.width, size.height), (128, 128, 128)))
        return replace(medium, source=(frame,) * size.total, fps=size.fps)

    return replace_images(items, lambda n: [grey(medium) for medium in items[n].conversation.images])


def shuffle_images(items: Sequence[Item], seed: int) -> list[Item]:
    """The items with the images and videos of another item that has as many; an item whose like is nowhere keeps its own."""
    others: dict[tuple[bool, ...], list[int]] = {}
    for number, item in enumerate(items):
        others.setdefault(tuple(isinstance(one, Video) for one in item.conversation.images), []).append(number)
    source = list(range(len(items)))
    for group in others.values():
        mixed = [group[i] for i in permutation(seed, len(group), 0)]
        for at, number in enumerate(mixed):
            turn = [mixed[(at + step) % len(mixed)] for step in range(1, len(mixed))]
            source[number] = next((n for n in turn if items[n].cluster != items[number].cluster), number)
    return replace_images(items, lambda n: items[source[n]].conversation.images)


def shuffle_frames(items: Sequence[Item], seed: int) -> list[Item]:
    """The items with the chosen frames of each video in another order, at the same times."""

    def mixed(number: int, medium: Medium) -> Medium:
        if not isinstance(medium, Video):
            return medium
        clip = load_clip(medium)
        order = permutation(seed + number, len(clip.frames), 0)
        if list(order) == sorted(order):
            order = [*order[1:], *order[:1]]
        shown = [encode_png(clip.frames[at]) for at in order]
        source = [shown[0]] * clip.size.total
        for at, frame in zip(clip.size.chosen, shown, strict=True):
            source[at] = frame
        return replace(medium, source=tuple(source), fps=clip.size.fps)

    return replace_images(items, lambda n: [mixed(n, medium) for medium in items[n].conversation.images])


def encode_png(image: Image.Image) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def count_leaked(items: Sequence[Item], training: Sequence[Conversation]) -> int:
    """Items whose images were trained on."""
    known = {hashlib.sha256(medium_bytes(medium)).hexdigest() for row in training for medium in row.images}
    return sum(
        any(hashlib.sha256(medium_bytes(one)).hexdigest() in known for one in item.conversation.images)
        for item in items
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
        if len(item.conversation.images) != 1 or isinstance(item.conversation.images[0], Video):
            raise UserError(
                f"{item.conversation.location}: VLMEvalKit's tables hold one image per row, not {len(item.conversation.images)}."
            )
        image = base64.b64encode(medium_bytes(item.conversation.images[0])).decode()
        options = [*item.options, *[""] * (most - len(item.options))]
        table.writerow([number, image, item.question, *options, item.references[0], item.split])
    write_text(path, buffer.getvalue())
    return path
