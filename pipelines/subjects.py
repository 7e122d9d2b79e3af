"""Several subjects in one image and one run of the denoiser, each with an adapter, words and a place of its own.

Places are given (regions), or equal columns in the order of the subjects.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from ..toolkit.core.errors import UserError
from ..toolkit.diffusion.model import DiffusionModel
from ..toolkit.formats import native
from ..toolkit.formats.adapter_folder import PARTS
from .apart import part_bounds
from .place import execution_device
from .token_masks import MaskedDenoiser, Words, token_masks

HERE = "{subjects}"
MIN_COLUMNS = 2  # image tokens that a subject's place is wide at least


# ---------------------------------------------------------------------------------------------- words


def parse_subjects(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """'sks1 creature' A 'sks2 creature' B -> the words and the adapters.

    Raises:
        UserError: for words without an adapter, or words that cannot be told apart.
    """
    if len(given) % 2:
        raise UserError(
            f"--subjects takes words and an adapter for each subject, as in --subjects 'sks1 creature' A 'sks2 creature' B; "
            f"'{given[-1]}' stands alone."
        )
    words = [" ".join(text.split()) for text in given[::2]]
    check_words(words)
    return words, list(given[1::2])


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for empty words, and for subjects whose words cannot be told apart."""
    for number, own in enumerate(words):
        if not own:
            raise UserError("--subjects: the words of a subject are empty; write its token, as in 'sks1 creature'.")
        if HERE in own:
            raise UserError(f"--subjects '{own}': {HERE} belongs into --prompt, not into the words of a subject.")
        for other in words[:number]:
            if find_words(own, other) or find_words(other, own):
                raise UserError(
                    f"--subjects '{other}' and '{own}' cannot be told apart: give each subject words that the others' do not hold."
                )


def find_words(text: str, words: str) -> re.Match[str] | None:
    """Where words stand in a text as whole words, in capitals or not."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)


def own_prompts(prompt: str, words: Sequence[str]) -> list[str]:
    """The prompt of each subject: with its own words where the prompt has {subjects}, or has the words of all.

    Raises:
        UserError: when the prompt has neither.
    """
    if HERE in prompt:
        return [prompt.replace(HERE, own) for own in words]
    found = [find_words(prompt, own) for own in words]
    if lacking := [own for own, place in zip(words, found, strict=True) if place is None]:
        raise UserError(
            f"--prompt '{prompt}' does not hold the words '{lacking[0]}' of --subjects: write {HERE} where the subjects stand, as in "
            f"--prompt '{HERE} in a meadow', or the words of all."
        )
    first = min(place.start() for place in found if place)
    last = max(place.end() for place in found if place)
    return [prompt[:first] + place.group() + prompt[last:] for place in found if place]


class OwnPrompt(str):
    """A prompt that stands for those of all subjects."""


def is_states(value: Any) -> bool:
    """Whether a value of encode_prompt is encoded words, (B, L, ...) or a list of (L, D)."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], torch.Tensor) and value[0].dim() == 2
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def is_mask(value: Any, states: Any) -> bool:
    """Whether a value of encode_prompt says which tokens of the states before it are words, (B, L)."""
    fits = isinstance(value, torch.Tensor) and isinstance(states, torch.Tensor) and value.shape == states.shape[:2]
    return fits and bool(((value == 0) | (value == 1)).all())


def concatenate(parts: Sequence[Any], *, by_token: bool) -> Any:
    """What encode_prompt gave for each subject, as one: tokens behind each other, pooled states (B, D) as their mean."""
    first = parts[0]
    if isinstance(first, list):
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]
    if not isinstance(first, torch.Tensor):
        return first
    if not by_token:
        return torch.stack(list(parts)).mean(0)
    return torch.cat(list(parts), 0 if first.shape[-1] == 3 and first.dim() == 2 else 1)


def merge_words(said: Sequence[Any], *, wanted: bool) -> tuple[Any, list[Words]]:
    """What encode_prompt gave for each subject, as one outcome, and the words in it.

    Filling of all subjects stands behind the words of all. encode_prompt gives words (B, L, ...), and behind them where it has such:
    positions (L, 3) or (B, L, 4), a mask (B, L), pooled states (B, D).
    """
    alone = not isinstance(said[0], tuple)
    said = [(one,) if alone else one for one in said]
    merged, found, states, at = [], [], None, 0
    for place, parts in enumerate(zip(*said, strict=True)):
        first = parts[0]
        if is_states(first):
            states, at = first, place
            owners = torch.cat([torch.full((len(part[0]),), number) for number, part in enumerate(parts)])
            merged.append(concatenate(parts, by_token=True))
            found.append(Words(merged[place][0], owners, len(owners), wanted and not found))
        elif is_mask(first, states):
            mask = concatenate(parts, by_token=True)
            keep = mask[0].bool()
            order = keep.int().argsort(descending=True, stable=True)
            merged[at] = merged[at][:, order]
            found[-1] = Words(merged[at][0], found[-1].owners[order.cpu()], int(keep.sum()), found[-1].wanted)
            merged.append(mask[:, order])
        else:
            tensor = isinstance(first, torch.Tensor)
            positions = tensor and (not first.is_floating_point() or (first.dim() == 2 and first.shape[-1] == 3))
            merged.append(concatenate(parts, by_token=positions))
    return merged[0] if alone else tuple(merged), found


@contextmanager
def words_of_subjects(
    pipe: Any, prompts: Sequence[str], adapters: Sequence[str], strengths: Sequence[float], known: list[Words]
) -> Iterator[None]:
    """Within the block the pipeline encodes an OwnPrompt, and what is steered away from, for each subject with its adapter alone.

    known: gets the words.
    """
    encoders = SimpleNamespace(**{part: getattr(pipe, part, None) for part in PARTS if part.startswith("text_encoder")})
    encode, signature = pipe.encode_prompt, inspect.signature(pipe.encode_prompt)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given, said = signature.bind(*args, **kwargs).arguments, []
        text = given["prompt"]
        wanted = isinstance(text, OwnPrompt) or (isinstance(text, list) and isinstance(text[0], OwnPrompt))
        for prompt, adapter, strength in zip(prompts, adapters, strengths, strict=True):
            native.set_strengths(encoders, {adapter: strength})
            own = given | ({"prompt": [prompt] * len(text) if isinstance(text, list) else prompt} if wanted else {})
            said.append(encode(**own))
        merged, words = merge_words(said, wanted=wanted)
        known.extend(words)
        return merged

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt
        native.set_strengths(encoders, dict(zip(adapters, strengths, strict=True)))


# ---------------------------------------------------------------------------------------------- places


def columns(subjects: int, height: int, width: int) -> torch.Tensor:
    """Equal parts of the image side by side, (1, subjects, height, width), each 1 in its own.

    Raises:
        UserError: for more subjects than there is room for.
    """
    if subjects > 1 and width < MIN_COLUMNS * subjects:
        raise UserError(
            f"{subjects} subjects cannot be told apart in an image that is {width} tokens wide: take "
            f"{width // MIN_COLUMNS} at most, or a larger --width."
        )
    owners = torch.cat([torch.full((right - left,), n) for n, (left, right) in enumerate(part_bounds(subjects, width))])
    return F.one_hot(owners, subjects).T[None, :, None].expand(1, -1, height, -1).float()


@contextmanager
def draw_subjects(
    pipe: Any,
    family: type[DiffusionModel],
    prompts: Sequence[str],
    places_BCHW: torch.Tensor,
    *,
    adapters: Sequence[str],
    strengths: Sequence[float],
    sources: Sequence[str],
) -> Iterator[MaskedDenoiser]:
    """Within the block the pipeline draws an OwnPrompt with all subjects, each in its place.

    adapters: their names on the pipeline. sources: what messages call them.
    """
    denoiser = getattr(pipe, family.denoiser_name)
    where = places_BCHW.to(execution_device(pipe), denoiser.dtype)
    with (
        token_masks(denoiser, family, where, adapters=adapters, strengths=strengths, sources=sources) as masked,
        words_of_subjects(pipe, prompts, adapters, strengths, masked.known),
    ):
        yield masked
