"""A conversation as tokens and labels: only answers, each with its end token, are learned.

Where answers are is found in two independent ways, which `verify_labels` requires to agree:

- by marks: two private characters are put around each answer, the template is rendered with them, and the characters between them
  are followed through the expansion of images into tokens (`labels_by_marks`, used in training);
- by prefixes: the conversation up to a question, with the words that ask for an answer, must be how its tokens begin; the tokens
  behind are the answer (`labels_by_prefixes`). This is also what generation does.

Everything is known without reading a pixel: images of the same size become the same text. So no row is ever cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image

from ..core.errors import UserError
from ..data.conversations import Conversation, Message

IGNORE = -100
ANSWER_START, ANSWER_END = "\ue000", "\ue001"  # private characters that no text has
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Tokens:
    """One conversation: ids (L,) and labels (L,), IGNORE where nothing is learned."""

    ids: list[int]
    labels: list[int]

    @property
    def num_learned(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORE for label in self.labels)


class ChatTokens:
    """A processor, its chat template, and the tokens that end an answer."""

    def __init__(
        self,
        processor: Any,
        end_ids: Sequence[int],
        *,
        prefix_attention: bool = False,
        appended: str = "",
        pad_to_square: bool = False,
    ) -> None:
        """ends: ids that stop generation; prefix_attention, appended: see VisionFamily; pad_to_square: images get borders, so that a
        processor that crops cuts nothing off.

        Raises:
            UserError: when there is no chat template, or one that does not say which words are an answer.
        """
        self.processor, self.tokenizer = processor, processor.tokenizer
        if not getattr(processor, "chat_template", None):
            raise UserError(
                "The base has no chat template, so nobody knows how its conversations are written: give one with --chat-template FILE."
            )
        if not self.tokenizer.is_fast:
            raise UserError("The base's tokenizer does not say where its tokens stand in the text (it is a slow one).")
        self.end_ids, self.pad_to_square = tuple(end_ids), pad_to_square
        self.end_texts = [self.tokenizer.convert_ids_to_tokens(i) for i in self.end_ids]
        self.prefix_attention, self.suffix = prefix_attention, appended
        self.added_end, self.written_prompt, self.generation_prompt, self.lead_length = "", "", "", 0
        self.probe_template()
        self.reset_cache()

    def reset_cache(self) -> None:
        """Remembers what images' marks become, by the images' sizes."""
        self.replacements = lru_cache(maxsize=65536)(self.find_replacements)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned, and read images with a memory of their own."""
        return {name: value for name, value in vars(self).items() if name != "replacements"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset_cache()

    # -------------------------------------------------------------------------- the template

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The template's text of messages; ask: with the words behind which an answer begins."""
        return self.processor.apply_chat_template(
            copy.deepcopy(list(messages)), tokenize=False, add_generation_prompt=ask
        )

    def probe_template(self) -> None:
        """Finds out what the template does around an answer.

        `added_end`: the end token that answers get because the template gives none, without which a model never learns to stop;
        `generation_prompt`: the words that ask for an answer, and `written_prompt`, what stands in their place before a finished one,
        which is put right when only blanks differ (LLaVA-OneVision's), so that what is trained is what generation needs;
        `lead_length`: characters between the words that ask and the answer, which the model has to say itself.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
        plain, asked, whole = (
            self.render([question]),
            self.render([question], ask=True),
            self.render([question, self.mark_answer(answer)]),
        )
        if ANSWER_START not in whole or ANSWER_END not in whole:
            raise UserError("The base's chat template leaves answers out, so they cannot be learned.")
        tail = whole.split(ANSWER_END)[1].lstrip()
        if not any(tail.startswith(end) for end in self.end_texts):
            self.added_end = self.end_texts[0]
        self.generation_prompt, self.written_prompt = asked[len(plain) :], whole[len(plain) : whole.index(ANSWER_START)]
        begins = asked.startswith(plain) and whole.startswith(plain)
        if begins and self.written_prompt.startswith(self.generation_prompt + self.suffix):
            self.lead_length = len(self.written_prompt) - len(self.generation_prompt + self.suffix)
        elif not begins or self.written_prompt.split() != self.generation_prompt.split():
            raise UserError(
                f"The base's chat template asks for an answer with {self.generation_prompt!r} and writes {self.written_prompt!r} before a "
                "finished one, so training would not teach what generation needs: give a corrected template with --chat-template FILE."
            )

    def mark_answer(self, message: Message) -> Message:
        """An answer between marks, with the end token that the template lacks; other messages as they are."""
        if message["role"] != "assistant":
            return message
        text = "".join(part["text"] for part in message["content"])
        return {
            "role": "assistant",
            "content": [{"type": "text", "text": f"{ANSWER_START}{text}{ANSWER_END}{self.added_end}"}],
        }

    def render_text(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages as it is trained and generated from; ask: with the words that ask for the next answer."""
        return self.spans(messages)[0] + (self.generation_prompt if ask else "")

    # -------------------------------------------------------------------------- images

    @cached_property
    def image_mark(self) -> str:
        """What the template writes for an image, and the processor replaces."""
        image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
        words = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        mark = getattr(self.processor, "image_token", None)
        if mark is None or self.render([image]).count(mark) != 1 or mark in self.render([words]):
            raise UserError("The base's chat template writes no mark for an image: give one with --chat-template FILE.")
        return mark

    def find_replacements(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """What the marks of images of these sizes become, when they stand together in one conversation."""
        blanks = [self.pad_image(Image.new("RGB", size)) for size in sizes]
        out = self.processor(text=[self.image_mark * len(sizes)], images=[blanks], return_text_replacement_offsets=True)
        return tuple(one["replacement"] for one in out["text_replacement_offsets"][0])

    def pad_image(self, image: Image.Image) -> Image.Image:
        """The image as the processor is given it: in a square of its mean colour, if so wished (LLaVA-1.5 was trained so)."""
        if not self.pad_to_square or image.width == image.height:
            return image
        side, mean = max(image.size), getattr(self.processor.image_processor, "image_mean", None) or [0.5] * 3
        ground = Image.new("RGB", (side, side), tuple(round(255 * value) for value in mean))
        ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return ground

    def image_token_ids(self) -> set[int]:
        """Tokens that stand for what images become."""
        known = [*getattr(self.processor, "image_token_ids", []), getattr(self.processor, "image_token_id", None)]
        return {number for number in known if number is not None}

    # -------------------------------------------------------------------------- the first way: marks

    def labels_by_marks(self, row: Conversation, sizes: Sequence[Size]) -> Tokens:
        """Tokens and labels of a row whose images have these sizes.

        Raises:
            UserError: when a text holds a control token, or the template rewrites an answer.
        """
        self.check_row(row)
        text, spans = self.spans(row.messages)
        text, spans = self.expand_images(text, spans, self.replacements(tuple(sizes)) if sizes else ())
        encoded = self.tokenizer(text, add_special_tokens=self.adds_special_tokens(text), return_offsets_mapping=True)
        ids = encoded["input_ids"]
        labels, number = [IGNORE] * len(ids), 0
        for at, (start, stop) in enumerate(encoded["offset_mapping"]):
            while number < len(spans) and start >= spans[number][1]:
                number += 1
            if number < len(spans) and stop > max(start, spans[number][0]):
                labels[at] = ids[at]
        return Tokens(ids, labels)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer is to put its own first token before a text: not when the template did."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and from where to where answers with their end tokens go.

        Raises:
            UserError: when the template does to one of the answers what it did not to the one it was tried on.
        """
        text, spans = "", []
        rest = self.render([self.mark_answer(message) for message in messages])
        while ANSWER_START in rest:
            before, rest = rest.split(ANSWER_START, 1)
            answer, rest = rest.split(ANSWER_END, 1)
            if not before.endswith(self.written_prompt):
                raise UserError("the chat template writes other words before this row's answers than before others.")
            if not self.written_prompt.startswith(self.generation_prompt + self.suffix):
                before = before.removesuffix(self.written_prompt) + self.generation_prompt
            text += before
            spans.append((len(text) - self.lead_length, len(text) + len(answer) + self.end_length(rest)))
            text += answer
        if len(spans) != sum(message["role"] == "assistant" for message in messages):
            raise UserError("the chat template leaves answers of this row out.")
        return text + rest, spans

    def end_length(self, rest: str) -> int:
        """How many characters of what follows an answer belong to its end token."""
        blanks = len(rest) - len(rest.lstrip())
        lengths = [blanks + len(end) for end in self.end_texts if rest.startswith(end, blanks)]
        return min(lengths, default=0)

    def expand_images(
        self, text: str, spans: list[tuple[int, int]], replacements: Sequence[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text as the processor makes it, with what images become, and the spans where they are then."""
        pieces = text.split(self.image_mark) if replacements else [text]
        if len(pieces) != len(replacements) + 1:
            raise UserError(f"the chat template writes {len(pieces) - 1} marks for {len(replacements)} images.")
        insertions = [(len(self.image_mark), replacement) for replacement in replacements]
        if self.prefix_attention:  # the first token stands behind the last image
            insertions[-1] = (len(self.image_mark), insertions[-1][1] + self.tokenizer.bos_token)
        whole, at, gains = pieces[0], len(pieces[0]), []
        for (length, replacement), piece in zip(insertions, pieces[1:], strict=True):
            gains.append((at, len(replacement) - length))
            whole += replacement + piece
            at += length + len(piece)
        gain = lambda start: sum(more for place, more in gains if place <= start)  # noqa: E731
        return whole + self.suffix, [(start + gain(start), stop + gain(start)) for start, stop in spans]

    def check_row(self, row: Conversation) -> None:
        """Raises UserError when a text holds what the base reads as a control token, or an image is missing that it must have."""
        if self.prefix_attention and not row.images:
            raise UserError(f"{row.location}: this base takes no row without an image.")
        for message in row.messages:
            for part in message["content"]:
                text = part.get("text", "")
                found = [token for token in self.control_tokens if token in text]
                if found or ANSWER_START in text or ANSWER_END in text:
                    raise UserError(
                        f"{row.location}: a text holds '{(found or ['a private character'])[0]}', which this base reads as a control "
                        "token: take it out (where it stands for an image, write <image> and name the image)."
                    )

    @cached_property
    def control_tokens(self) -> list[str]:
        """Texts of control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({token.content for token in added if token.special and token.content.strip()})

    # -------------------------------------------------------------------------- the second way: prefixes

    def labels_by_prefixes(self, row: Conversation, images: Sequence[Image.Image]) -> Tokens:
        """The same by the processor itself, from the tokens of ever longer parts of the conversation.

        Raises:
            UserError: when a part's tokens are not how those of the whole begin.
        """
        whole = self.encode(row, images)
        labels = [IGNORE] * len(whole)
        for number, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = self.encode(row.until(number), images, ask=True)
            through = self.encode(row.until(number + 1), images)
            if whole[: len(before)] != before:
                raise UserError(
                    f"{row.location}: what asks for answer {number} is not how the tokens of the conversation begin."
                )
            stop = next(
                (at for at in range(len(before), len(through)) if through[at] in self.end_ids), len(through) - 1
            )
            labels[len(before) : stop + 1] = whole[len(before) : stop + 1]
        return Tokens(whole, labels)

    def encode(self, row: Conversation, images: Sequence[Image.Image], *, ask: bool = False) -> list[int]:
        """The processor's own tokens."""
        text = self.render_text(row.messages, ask=ask)
        padded = [self.pad_image(image) for image in images[: len(row.images)]]
        out = self.processor(
            text=[text], images=[padded] if padded else None, add_special_tokens=self.adds_special_tokens(text)
        )
        return list(out["input_ids"][0])

    # -------------------------------------------------------------------------- the proof

    def verify_labels(self, row: Conversation, images: Sequence[Image.Image]) -> Tokens:
        """The row's tokens, once both ways agree and they are what a model can learn from.

        Raises:
            UserError: naming what is wrong.
        """
        tokens = self.labels_by_marks(row, [image.size for image in images])
        other = self.labels_by_prefixes(row, images)
        if tokens.ids != other.ids:
            raise UserError(f"{row.location}: the processor's tokens are not those that were planned.")
        if tokens.labels != other.labels:
            at = next(n for n, pair in enumerate(zip(tokens.labels, other.labels, strict=True)) if pair[0] != pair[1])
            raise UserError(
                f"{row.location}: the two ways to find the answers disagree at token {at} ('{self.tokenizer.decode(tokens.ids[at])}')."
            )
        self.check_learned(tokens, row)
        return tokens

    def check_learned(self, tokens: Tokens, row: Conversation) -> None:
        """Raises UserError when labels are what nobody would want: empty, without an end, on an image; or the first token is doubled."""
        answers = sum(message["role"] == "assistant" for message in row.messages)
        ended = sum(label in self.end_ids for label in tokens.labels)
        first = self.tokenizer.bos_token_id
        if ended != answers:
            raise UserError(f"{row.location}: {answers} answers have {ended} end tokens among what is learned.")
        if set(tokens.labels) & self.image_token_ids():
            raise UserError(f"{row.location}: tokens of an image are among what is learned.")
        if first is not None and first not in self.end_ids and tokens.ids.count(first) > 1:
            raise UserError(
                f"{row.location}: the token {self.tokenizer.bos_token} stands {tokens.ids.count(first)} times."
            )

    # -------------------------------------------------------------------------- batches

    def collate(self, rows: Sequence[Conversation], images: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """What the model is given for rows: the processor's tensors, padded on the right, and labels (B, L).

        Raises:
            UserError: when the processor's tokens are not the planned ones.
        """
        texts = [self.render_text(row.messages) for row in rows]
        inputs = self.processor_inputs(texts, images, padding_side="right")
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        lengths = []
        for number, (row, own) in enumerate(zip(rows, images, strict=True)):
            tokens = self.labels_by_marks(row, [image.size for image in own])
            length = len(tokens.ids)
            if inputs["input_ids"][number, :length].tolist() != tokens.ids:
                raise UserError(f"{row.location}: the processor's tokens are not those that were planned.")
            labels[number, :length] = torch.tensor(tokens.labels)
            lengths.append(length)
        inputs["attention_mask"] = (torch.arange(labels.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
        if (
            self.prefix_attention
        ):  # what stands before the first answer sees all of itself, the rest only what is before it
            inputs["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).long()
        return inputs | {"labels": labels}

    def processor_inputs(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], *, padding_side: str
    ) -> dict[str, torch.Tensor]:
        """The processor's tensors for rendered texts, padded on this side."""
        some = any(len(own) for own in images)
        out = self.processor(
            text=list(texts),
            images=[[self.pad_image(image) for image in own] for own in images] if some else None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            add_special_tokens=self.adds_special_tokens(texts[0]),
        )
        return {key: value for key, value in out.items() if key != "labels"}

    def collate_questions(
        self, rows: Sequence[Conversation], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, torch.Tensor]:
        """What generation is given: rows that end with a question, asked for an answer, padded on the left."""
        texts = [self.render_text(row.messages, ask=True) for row in rows]
        return self.processor_inputs(texts, images, padding_side="left")
