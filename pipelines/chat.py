"""Questions about images, answered by a vision-language model, with any adapters at any strengths or with none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F

from ..toolkit.adapters.attach import disable_adapters
from ..toolkit.core.devices import check_precision
from ..toolkit.core.errors import UserError
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.core.setting_names import as_flag
from ..toolkit.data.conversations import Conversation
from ..toolkit.data.image_checks import check_image
from ..toolkit.data.videos import Video, load_medium
from ..toolkit.diffusion.model import DTYPES
from ..toolkit.formats import native
from ..toolkit.formats.adapter_folder import is_peft_folder
from ..toolkit.formats.locate import adapter_facts
from ..toolkit.formats.vlm_folder import load_peft_folder
from ..toolkit.vlm.chat_tokens import IGNORE
from ..toolkit.vlm.model import VisionLanguageModel, resolve_vision_base


def open_chat(
    base: str,
    adapters: Sequence[Path] = (),
    strengths: Sequence[float] = (),
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    template: str | None = None,
    video_frames: int | None = None,
) -> VisionLanguageModel:
    """A base model with adapters, ready to answer. strengths: one for each adapter; 1 is as trained. video_frames: most frames of a
    video; None is as the adapters were trained.

    Raises:
        UserError: for a base or an adapter that is not there, or one that was made for another base.
    """
    check_precision(precision, training=False)
    strengths = list(strengths) or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise UserError(f"{len(adapters)} adapters need as many strengths, not {len(strengths)}.")
    settings = image_settings(adapters)
    settings["video_frames"] = video_frames or settings["video_frames"]
    vision = VisionLanguageModel(resolve_vision_base(base), DTYPES[precision], device, template=template, **settings)
    names = {}
    for number, (folder, strength) in enumerate(zip(adapters, strengths, strict=True)):
        if is_peft_folder(Path(folder)):
            load_peft_folder(vision.model, Path(folder), f"adapter_{number}")
        else:
            native.load_layers(vision, Path(folder), f"adapter_{number}")
        names[f"adapter_{number}"] = strength
    native.set_strengths(vision, names)
    vision.model.to(vision.device)
    return vision


def image_settings(adapters: Sequence[Path]) -> dict[str, Any]:
    """How the adapters' images and videos were given to the base when they were trained.

    Raises:
        UserError: when they were given in different ways.
    """
    settings: dict[str, Any] = {}
    for name in ("pad_to_square", "max_pixels", "min_pixels", "video_frames"):
        ways = {getattr(adapter_facts(Path(folder)), name) or None for folder in adapters}
        if len(ways) > 1:
            raise UserError(
                f"The adapters were trained with different {as_flag(name)}: {', '.join(map(str, ways))}. Use them one by one."
            )
        settings[name] = next(iter(ways), None)
    return settings | {"pad_to_square": bool(settings["pad_to_square"])}


def question_inputs(vision: VisionLanguageModel, rows: Sequence[Conversation]) -> dict[str, Any]:
    """What generation is given for rows that end with a question."""
    media = [load_media(vision, row) for row in rows]
    return vision.to_device(vision.chat.collate_questions(rows, media))


def load_media(vision: VisionLanguageModel, row: Conversation) -> list[Any]:
    """A row's images, and those frames of its videos that the base is given."""
    videos = {medium: check_image(medium) for medium in row.images if isinstance(medium, Video) and medium.size is None}
    return [load_medium(medium) for medium in (vision.chat.choose_frames(row, videos) if videos else row).images]


@oom_context("answering")
@torch.no_grad()
def answers(
    vision: VisionLanguageModel, rows: Sequence[Conversation], *, max_new_tokens: int = 256, batch: int = 16
) -> list[str]:
    """Greedy answers to rows that end with a question. The model must be in eval mode."""
    return [one.text for one in whole_answers(vision, rows, max_new_tokens=max_new_tokens, batch=batch)]


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    cut: bool
    """Whether it had not come to its end when the limit of tokens was reached."""


@oom_context("answering")
@torch.no_grad()
def whole_answers(
    vision: VisionLanguageModel, rows: Sequence[Conversation], *, max_new_tokens: int = 256, batch: int = 16
) -> list[Answer]:
    """The same, and whether each came to its end."""
    tokenizer, said = vision.processor.tokenizer, []
    ends = set(vision.chat.end_ids)
    for start in range(0, len(rows), batch):
        inputs = question_inputs(vision, rows[start : start + batch])
        ids = vision.model.generate(**inputs, **generation_kwargs(vision, max_new_tokens))
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        said += [Answer(text.strip(), not ends & set(own)) for text, own in zip(texts, new.tolist(), strict=True)]
    return said


def generation_kwargs(vision: VisionLanguageModel, max_new_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
    """To the first end token, greedy or with a temperature."""
    pad = vision.processor.tokenizer.pad_token_id
    return {
        "max_new_tokens": max_new_tokens,
        **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
        "eos_token_id": list(vision.chat.end_ids),
        "pad_token_id": vision.chat.end_ids[0] if pad is None else pad,
    }


def stream(
    vision: VisionLanguageModel, row: Conversation, *, max_new_tokens: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """The answer piece by piece, as it is made. temperature: 0 takes the likeliest token, greedy.

    Raises:
        Exception: what generation raised, once the stream ends.
    """
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(vision.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    faults: list[BaseException] = []

    def run() -> None:
        try:
            with oom_context("answering"), torch.no_grad():
                vision.model.generate(
                    **question_inputs(vision, [row]),
                    **generation_kwargs(vision, max_new_tokens, temperature),
                    streamer=streamer,
                )
        except BaseException as fault:  # it would die with the thread
            faults.append(fault)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if faults:
        raise faults[0]


@oom_context("answering")
@torch.no_grad()
def option_scores(vision: VisionLanguageModel, row: Conversation, options: Sequence[str]) -> list[float]:
    """Log-likelihood of each option as the answer to a row that ends with a question, its end token counted."""
    images = load_media(vision, row)
    asked = [
        Conversation(
            (*row.messages, {"role": "assistant", "content": [{"type": "text", "text": option}]}),
            row.images,
            row.location,
        )
        for option in options
    ]
    made = vision.chat.collate(asked, [images] * len(options))
    labels = made.pop("labels")
    inputs = vision.to_device(made)
    places = (labels != IGNORE).any(0).nonzero()[:, 0] - 1
    logits = vision.model(**inputs, logits_to_keep=places.to(vision.device), use_cache=False).logits.float().cpu()
    goal = labels[:, places + 1]
    losses = F.cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORE, reduction="none")
    return (-losses.view(goal.shape).sum(1)).tolist()


def base_model_only(vision: VisionLanguageModel) -> Any:
    """Within the block the model answers as it would without any adapter."""
    return disable_adapters(vision.model) if hasattr(vision.model, "peft_config") else nullcontext()
