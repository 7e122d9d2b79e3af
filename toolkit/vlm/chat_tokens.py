"""A conversation as tokens and labels: only answers, each with its end token, are learned.

Where answers are is found in two independent ways, which `verify_labels` requires to agree:

- by marks: two private characters are put around each answer, the template is rendered with them, and the characters between them
  are followed through the expansion of images into tokens (`labels_by_marks`, used in training);
- by prefixes: the conversation up to a question, with the words that ask for an answer, must be how its tokens begin; the tokens
  behind are the answer (`labels_by_prefixes`). This is also what generation does.

Everything is known without reading a pixel: images of the same size become the same text. So no row is ever cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from PIL import Image

from ..core.cache import cache_key
from ..core.errors import UserError
from ..data.conversations import Conversation, Message
from ..data.image_checks import CheckedImage
from ..data.videos import Clip, ClipSize, Medium, Video, VideoFacts
from .chat_template import ANSWER_END, ANSWER_START, ChatTemplate, Span
from .grounding import LOCATION, Grounding
from .image_tokens import ImageTokens, Size
from .video_tokens import VideoTokens, join_rows

IGNORE = -100
MediumSize = Size | ClipSize
THOUGHT_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")  # control tokens that answers may hold


@dataclass(frozen=True)
class Tokens:
    """One conversation: ids (L,), labels (L,), IGNORE where nothing is learned, and how much each learned token counts (L,)."""

    ids: list[int]
    labels: list[int]
    weights: list[float]

    @property
    def num_learned(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Measure:
    """How long a conversation is."""

    length: int
    """Tokens, those of images counted."""
    num_learned: int
    weight: float
    """Sum of the weights of the tokens that are learned."""


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
        boxes: str = "relative",
        video_frames: int | None = None,
        takes_video: bool = True,
        equal_videos: bool = False,
    ) -> None:
        """ends: ids that stop generation; prefix_attention, appended: see VisionFamily; pad_to_square: images get borders, so that a
        processor that crops cuts nothing off; boxes: how places are written, see grounding.py; video_frames, takes_video,
        equal_videos: see VideoTokens.

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
        self.prefix_attention, self.suffix = prefix_attention, appended
        self.grounding = Grounding(processor, boxes, pad_to_square)
        self.videos = VideoTokens(processor, limit=video_frames, takes_video=takes_video, equal_length=equal_videos)
        self.template = ChatTemplate(
            processor, [self.tokenizer.convert_ids_to_tokens(i) for i in self.end_ids], appended
        )

    # -------------------------------------------------------------------------- the template

    @property
    def added_end(self) -> str:
        """The end token that answers get because the template gives none."""
        return self.template.added_end

    def render_text(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages as it is trained and generated from; ask: with the words that ask for the next answer."""
        return self.template.prompt(messages) if ask else self.template.spans(messages)[0]

    def split_turns(self, row: Conversation) -> list[Conversation]:
        """The row itself, or where its template rewrites earlier answers one conversation for each answer that is learned."""
        if self.template.learns_each(row.messages):
            return [row]
        answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
        return [row.learn_only(number) for number in answers if row.weight(number) > 0]

    def fingerprint(self) -> str:
        """What the tokens of a conversation depend on beside itself."""
        pixels, videos = (getattr(self.processor, f"{kind}_processor", None) for kind in ("image", "video"))
        return cache_key(
            template=self.processor.chat_template,
            processor=self.processor.to_json_string(),
            images=pixels.to_json_string() if pixels is not None else "",
            videos=videos.to_json_string() if videos is not None else "",
            words=len(self.tokenizer),
            sample=self.tokenizer("The quick brown fox: 12 <b>\n")["input_ids"],
            square=self.pad_to_square,
            boxes=self.grounding.convention,
            transformers=transformers.__version__,
        )

    # -------------------------------------------------------------------------- images

    @cached_property
    def image_mark(self) -> str:
        """What the template writes for an image, and the processor replaces."""
        image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
        words = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        mark, render = getattr(self.processor, "image_token", None), self.template.render
        if mark is None or render([image]).count(mark) != 1 or mark in render([words]):
            raise UserError("The base's chat template writes no mark for an image: give one with --chat-template FILE.")
        return mark

    @cached_property
    def images(self) -> ImageTokens:
        """What the marks of images become."""
        return ImageTokens(self.processor, self.image_mark, self.pad_to_square)

    @cached_property
    def video_mark(self) -> str:
        """What the template writes for a video, and the processor replaces.

        Raises:
            UserError: for a base that takes no video.
        """
        video = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q"}]}
        mark = self.videos.mark
        if mark is None or self.pad_to_square:
            why = "the base takes no video" if mark is None else "--pad-to-square is of images, and cannot be of videos"
            raise UserError(
                f"{why}: give single frames as images, or leave it out, --columns ignore=video ignore=videos."
            )
        if self.template.render([video]).count(mark) != 1:
            raise UserError("The base's chat template writes no mark for a video: give one with --chat-template FILE.")
        return mark

    def choose_frames(self, row: Conversation, checked: dict[Medium, CheckedImage]) -> Conversation:
        """The row with the frames chosen that the base is given of its videos.

        checked: what each video is; one that is not among them keeps its frames.

        Raises:
            UserError: for a video that is not sound, or that the base does not take.
        """
        if not any(isinstance(medium, Video) for medium in row.images):
            return row
        assert self.video_mark
        if not self.videos.stand_beside_images and not all(isinstance(medium, Video) for medium in row.images):
            raise UserError(
                f"{row.location}: it has an image beside a video, and this base's processor loses the image: give the video's "
                "frames as images, or the two in rows of their own."
            )
        row = replace(row, images=tuple(self.choose_for(medium, checked) for medium in row.images))
        counts = {len(one.size.chosen) for one in row.images if isinstance(one, Video) and one.size}
        if len(counts) > 1 and not self.videos.may_differ:
            raise UserError(
                f"{row.location}: its videos have {' and '.join(map(str, sorted(counts)))} frames, and this base's processor takes one "
                f"number in a row: --video-frames {min(counts)}, or rows of their own."
            )
        return row

    def choose_for(self, medium: Medium, checked: dict[Medium, CheckedImage]) -> Medium:
        """A video with its frames chosen; an image as it is."""
        if not isinstance(medium, Video) or medium not in checked:
            return medium
        found = checked[medium]
        if found.fault:
            raise UserError(found.fault)
        facts = VideoFacts(*found.size, found.frames, found.fps)
        return replace(medium, size=self.videos.choose(facts, whole=isinstance(medium.source, tuple)))

    def replacements(self, sizes: Sequence[MediumSize]) -> tuple[str, ...]:
        """What the marks of images and videos of these sizes become, when they stand together in one conversation."""
        still = tuple(size for size in sizes if not isinstance(size, ClipSize))
        images = iter(
            self.images.replacements(still) if still else ()
        )  # a template for texts alone needs no mark for images
        return tuple(self.videos.replacement(size) if isinstance(size, ClipSize) else next(images) for size in sizes)

    def pad_image(self, image: Image.Image) -> Image.Image:
        """The image as the processor is given it."""
        return self.images.prepare(image)

    def image_token_ids(self) -> set[int]:
        """Tokens that stand for what images become."""
        single = [getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")]
        known = [*getattr(self.processor, "image_token_ids", []), *single]
        return {number for number in known if number is not None}

    # -------------------------------------------------------------------------- the first way: marks

    def labels_by_marks(self, row: Conversation, sizes: Sequence[MediumSize]) -> Tokens:
        """Tokens and labels of a row whose images and videos have these sizes.

        Raises:
            UserError: when a text holds a control token, or the template rewrites an answer.
        """
        self.check_row(row)
        row = self.grounding.fill(row, sizes)
        text, spans = self.template.spans(row.messages)
        text, spans = self.expand_media(text, spans, sizes)
        return self.label(text, spans, row)

    def label(self, text: str, spans: Sequence[Span], row: Conversation) -> Tokens:
        """Tokens and labels of a text with these answers."""
        encoded = self.tokenizer(text, add_special_tokens=self.adds_special_tokens(text), return_offsets_mapping=True)
        ids = encoded["input_ids"]
        labels, weights, number = [IGNORE] * len(ids), [0.0] * len(ids), 0
        for at, (start, stop) in enumerate(encoded["offset_mapping"]):
            while number < len(spans) and start >= spans[number].stop:
                number += 1
            if number < len(spans) and stop > max(start, spans[number].start):
                weight = row.weight(spans[number].number)
                if weight > 0:
                    labels[at], weights[at] = ids[at], weight
        return Tokens(ids, labels, weights)

    def measure(self, row: Conversation, sizes: Sequence[MediumSize]) -> Measure:
        """How long a row is whose images and videos have these sizes, without writing out what they become where that is not needed.

        Raises:
            UserError: as `labels_by_marks` does.
        """
        more = 0
        images = tuple(size for size in sizes if not isinstance(size, ClipSize))
        if images and len(images) == len(sizes) and self.counts_images_alone(images):
            self.check_row(row)
            row = self.grounding.fill(row, sizes)
            text, spans = self.template.spans(row.messages)
            if text.count(self.image_mark) != len(sizes):
                raise UserError(
                    f"the chat template writes {text.count(self.image_mark)} marks for {len(sizes)} images."
                )
            tokens, more = (
                self.label(text + self.suffix, spans, row),
                sum(self.images.token_counts(images)) - len(images),
            )
        else:
            tokens = self.labels_by_marks(row, sizes)
        return Measure(len(tokens.ids) + more, tokens.num_learned, sum(tokens.weights))

    def counts_images_alone(self, sizes: tuple[Size, ...]) -> bool:
        """Whether the tokens of what images become have nothing to do with those of the words beside them."""
        if self.prefix_attention or self.image_mark not in self.control_tokens:
            return False
        ends = tuple(self.control_tokens)
        return all(text.startswith(ends) and text.endswith(ends) for text in self.replacements(sizes))

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer is to put its own first token before a text: not when the template did."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def expand_media(self, text: str, spans: Sequence[Span], sizes: Sequence[MediumSize]) -> tuple[str, list[Span]]:
        """The text as the processor makes it, with what images and videos become, and the spans where they are then."""
        texts: dict[str, list[str]] = {}
        for size, replacement in zip(sizes, self.replacements(sizes), strict=True):
            texts.setdefault(self.video_mark if isinstance(size, ClipSize) else self.image_mark, []).append(replacement)
        for mark, own in texts.items():
            if text.count(mark) != len(own):
                raise UserError(
                    f"the chat template writes {text.count(mark)} marks {mark} for {len(own)} images or videos."
                )
        if self.prefix_attention and sizes:  # the first token stands behind the last image
            texts[self.image_mark][-1] += self.tokenizer.bos_token
        whole, at, gains = "", 0, []
        for match in re.finditer("|".join(map(re.escape, texts)), text) if texts else ():
            replacement = texts[match[0]].pop(0)
            gains.append((match.start(), len(replacement) - len(match[0])))
            whole += text[at : match.start()] + replacement
            at = match.end()
        whole += text[at:]
        gain = lambda start: sum(more for place, more in gains if place <= start)  # noqa: E731
        moved = [Span(one.number, one.start + gain(one.start), one.stop + gain(one.start)) for one in spans]
        return whole + self.suffix, moved

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
        found = {token.content for token in added if token.special and token.content.strip()}
        return sorted(text for text in found - set(THOUGHT_TAGS) if not LOCATION.fullmatch(text))

    # -------------------------------------------------------------------------- the second way: prefixes

    def labels_by_prefixes(self, row: Conversation, images: Sequence[Image.Image | Clip]) -> Tokens:
        """The same by the processor itself, from the tokens of ever longer parts of the conversation.

        Raises:
            UserError: when a part's tokens are not how those of the whole begin.
        """
        whole = self.encode(row, images)
        labels, weights = [IGNORE] * len(whole), [0.0] * len(whole)
        for number in self.learned_answers(row):
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
            weights[len(before) : stop + 1] = [row.weight(number)] * (stop + 1 - len(before))
        return Tokens(whole, labels, weights)

    def learned_answers(self, row: Conversation) -> list[int]:
        """Numbers of the messages of which something is learned."""
        answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
        if not self.template.learns_each(row.messages):
            answers = answers[-1:]
        return [number for number in answers if row.weight(number) > 0]

    def encode(self, row: Conversation, images: Sequence[Image.Image | Clip], *, ask: bool = False) -> list[int]:
        """The processor's own tokens."""
        row = self.grounding.fill(row, [image.size for image in images])
        text = self.render_text(row.messages, ask=ask)
        return self.process_row(text, images[: len(row.images)])["input_ids"][0].tolist()

    def process_row(self, text: str, media: Sequence[Image.Image | Clip]) -> dict[str, torch.Tensor]:
        """The processor's tensors for one rendered text, without padding."""
        images = [self.pad_image(medium) for medium in media if not isinstance(medium, Clip)]
        clips = [medium for medium in media if isinstance(medium, Clip)]
        out = self.processor(
            text=[text],
            images=[images] if images else None,
            **self.videos.clip_arguments(clips),
            return_tensors="pt",
            add_special_tokens=self.adds_special_tokens(text),
        )
        return {key: torch.as_tensor(value) for key, value in out.items() if key != "labels"}

    # -------------------------------------------------------------------------- the proof

    def verify_labels(self, row: Conversation, images: Sequence[Image.Image | Clip]) -> Tokens:
        """The row's tokens, once both ways agree and they are what a model can learn from.

        Raises:
            UserError: naming what is wrong.
        """
        tokens = self.labels_by_marks(row, [image.size for image in images])
        other = self.labels_by_prefixes(row, images)
        if tokens.ids != other.ids:
            raise UserError(f"{row.location}: the processor's tokens are not those that were planned.")
        if (tokens.labels, tokens.weights) != (other.labels, other.weights):
            pairs = enumerate(zip(tokens.labels, other.labels, tokens.weights, other.weights, strict=True))
            at = next(n for n, (own, theirs, weight, other_weight) in pairs if own != theirs or weight != other_weight)
            raise UserError(
                f"{row.location}: the two ways to find the answers disagree at token {at} ('{self.tokenizer.decode(tokens.ids[at])}')."
            )
        self.check_learned(tokens, row)
        return tokens

    def check_learned(self, tokens: Tokens, row: Conversation) -> None:
        """Raises UserError when labels are what nobody would want: empty, without an end, on an image; or the first token is doubled."""
        answers = len(self.learned_answers(row))
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

    def collate(
        self, rows: Sequence[Conversation], images: Sequence[Sequence[Image.Image | Clip]]
    ) -> dict[str, torch.Tensor]:
        """What the model is given for rows: the processor's tensors, padded on the right, and labels (B, L).

        Raises:
            UserError: when the processor's tokens are not the planned ones.
        """
        rows = [self.grounding.fill(row, [image.size for image in own]) for row, own in zip(rows, images, strict=True)]
        texts = [self.render_text(row.messages) for row in rows]
        inputs = self.processor_inputs(texts, images, padding_side="right")
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        weights = torch.zeros(labels.shape)
        lengths = []
        for number, (row, own) in enumerate(zip(rows, images, strict=True)):
            tokens = self.labels_by_marks(row, [image.size for image in own])
            length = len(tokens.ids)
            if inputs["input_ids"][number, :length].tolist() != tokens.ids:
                raise UserError(f"{row.location}: the processor's tokens are not those that were planned.")
            labels[number, :length] = torch.tensor(tokens.labels)
            weights[number, :length] = torch.tensor(tokens.weights)
            lengths.append(length)
        inputs["attention_mask"] = (torch.arange(labels.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
        if (
            self.prefix_attention
        ):  # what stands before the first answer sees all of itself, the rest only what is before it
            inputs["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).long()
        some_differ = any(row.weights for row in rows) and not torch.equal(weights > 0, weights == 1)
        return inputs | {"labels": labels} | ({"token_weights": weights} if some_differ else {})

    def processor_inputs(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image | Clip]], *, padding_side: str
    ) -> dict[str, torch.Tensor]:
        """The processor's tensors for rendered texts, padded on this side."""
        if any(isinstance(medium, Clip) for own in images for medium in own):
            pad = self.tokenizer.pad_token_id
            rows = [self.process_row(text, own) for text, own in zip(texts, images, strict=True)]
            return join_rows(rows, self.end_ids[0] if pad is None else pad, left=padding_side == "left")
        some = any(len(own) for own in images)
        out = self.processor(
            text=list(texts),
            images=[[self.pad_image(image) for image in own if isinstance(image, Image.Image)] for own in images]
            if some
            else None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            add_special_tokens=self.adds_special_tokens(texts[0]),
        )
        return {key: value for key, value in out.items() if key != "labels"}

    def collate_questions(
        self, rows: Sequence[Conversation], images: Sequence[Sequence[Image.Image | Clip]]
    ) -> dict[str, torch.Tensor]:
        """What generation is given: rows that end with a question, asked for an answer, padded on the left."""
        filled = [
            self.grounding.fill(row, [image.size for image in own]) for row, own in zip(rows, images, strict=True)
        ]
        texts = [self.render_text(row.messages, ask=True) for row in filled]
        return self.processor_inputs(texts, images, padding_side="left")
