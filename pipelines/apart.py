"""The steps of several subjects in one image: first each has the whole image to itself, then its own part of it alone.

In the first steps every subject is denoised on the whole image, moved sideways to the middle (on a ring), where a model puts a subject
most readily, and each part of the prediction is that of its own subject: by then there are as many figures as subjects. In the steps
behind, a part is denoised without sight of the others, so that the model does not make one figure of them; together the parts are as
large as the image, so a step costs one pass of the denoiser. Denoisers with cross-attention get the parts as rows of one batch; in
those that have words and image in one sequence, image tokens attend to their own part alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .token_masks import MaskedDenoiser, SubjectAttention, Tokens, Words

WHOLE_SHARE = 0.3
"""Share of the steps in which each subject has the whole image; chosen on the embedded base: with 0.2 one figure is often lost."""
Bounds = Sequence[tuple[int, int]]
"""First column of tokens, and that behind the last, of each part."""


def part_bounds(parts: int, width: int) -> Bounds:
    """Parts of an image that is so many tokens wide, side by side and equal to one token."""
    edges = [round(number * width / parts) for number in range(parts + 1)]
    return list(pairwise(edges))


# ---------------------------------------------------------------------------------------------- columns of what a denoiser is given

Change = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(tensor, its dimension of columns, columns of it that one token has) -> tensor."""


def change_columns(value: Any, grid: tuple[int, int], change: Change) -> Any:
    """An image before or behind the denoiser with its columns changed: maps (..., H, W), tokens (B, N, D), or a list of maps."""
    if isinstance(value, list):
        return [change_columns(one, grid, change) for one in value]
    if value.dim() == 3:
        return change(value.unflatten(1, grid), 2, 1).flatten(1, 2)
    return change(value, value.dim() - 1, value.shape[-1] // grid[1])


def roll(value: Any, grid: tuple[int, int], shift: int) -> Any:
    """The image moved sideways by so many tokens, on a ring."""
    return change_columns(value, grid, lambda tensor, dim, scale: tensor.roll(shift * scale, dim))


def cut(value: Any, grid: tuple[int, int], part: tuple[int, int]) -> Any:
    """A part of the image."""
    left, right = part
    return change_columns(
        value, grid, lambda tensor, dim, scale: tensor.narrow(dim, left * scale, (right - left) * scale)
    )


def join(parts: Sequence[Any], height: int) -> Any:
    """Parts of an image side by side, each as `cut` gives it. height: in tokens."""
    first = parts[0]
    if isinstance(first, list):
        return [join(own, height) for own in zip(*parts, strict=True)]
    if first.dim() == 3:
        return torch.cat([part.unflatten(1, (height, -1)) for part in parts], 2).flatten(1, 2)
    return torch.cat(list(parts), -1)


def repeat_rows(value: Any, rows: int, times: int) -> Any:
    """What a denoiser with cross-attention is called with, for a batch that is so many times as large."""
    if isinstance(value, dict):
        return {key: repeat_rows(one, rows, times) for key, one in value.items()}
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
        return torch.cat([value] * times)
    return value


# ---------------------------------------------------------------------------------------------- steps


@dataclass
class Apart:
    """What a denoiser does in place of its forward: subjects apart, on the whole image or on their parts."""

    forward: Callable[..., Any]
    masked: MaskedDenoiser
    signature: inspect.Signature
    whole: bool = True
    """Whether each subject has the whole image now, or its part alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = self.masked.tokens
        grid = tuple(tokens.places_BCHW.shape[2:])  # type: ignore[union-attr]
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        image = next(iter(self.signature.parameters))
        try:
            if tokens.words_first is not None and not self.whole:  # type: ignore[union-attr]
                self.masked.tokens = self.masked.alone(tokens)
                return self.forward(**given)
            made, outcome = (self.in_rows if tokens.words_first is None else self.in_turn)(tokens, given, image, grid)  # type: ignore[union-attr, arg-type]
        finally:
            self.masked.tokens = tokens
        joined = join(made, grid[0])
        return (joined, *outcome[1:]) if isinstance(outcome, tuple) else type(outcome)(sample=joined)

    def shift(self, part: tuple[int, int], width: int) -> int:
        """How far a part moves to be in the middle of the whole image."""
        return (width - part[0] - part[1]) // 2 if self.whole else 0

    def in_turn(
        self, tokens: Tokens, given: dict[str, Any], image: str, grid: tuple[int, int]
    ) -> tuple[list[Any], Any]:
        """Each part of the prediction for the whole image, by one call for each subject, and the last call's outcome."""
        made, outcome = [], None
        for subject, part in enumerate(part_bounds(tokens.places_BCHW.shape[1], grid[1])):
            self.masked.tokens = self.masked.alone(tokens, subject)
            shift = self.shift(part, grid[1])
            outcome = self.forward(**(given | {image: roll(given[image], grid, shift)}))
            made.append(cut(roll(outcome[0], grid, -shift), grid, part))
        return made, outcome

    def in_rows(
        self, tokens: Tokens, given: dict[str, Any], image: str, grid: tuple[int, int]
    ) -> tuple[list[Any], Any]:
        """The same, by one call for all subjects whose parts are as wide, each with its own words."""
        bounds, made, outcome = part_bounds(tokens.places_BCHW.shape[1], grid[1]), [], None
        rows = len(tokens.words)
        for width, group in groupby(
            sorted(range(len(bounds)), key=lambda n: bounds[n][0] - bounds[n][1]),
            lambda n: grid[1] if self.whole else bounds[n][1] - bounds[n][0],
        ):
            members = list(group)
            own = self.rows_of(tokens, members, (grid[0], width))
            call = {key: repeat_rows(value, rows, len(members)) for key, value in given.items()}
            for name in (self.masked.family.words_argument, "encoder_attention_mask"):
                if call.get(name) is not None:
                    call[name] = own_words(given[name], tokens.words, members)
            seen = [given[image] if self.whole else cut(given[image], grid, bounds[member]) for member in members]
            shifts = [self.shift(bounds[member], grid[1]) for member in members]
            call[image] = torch.cat([roll(one, grid, shift) for one, shift in zip(seen, shifts, strict=True)])
            self.masked.tokens = own
            outcome = self.forward(**call)
            for member, shift, part in zip(members, shifts, outcome[0].chunk(len(members)), strict=True):
                made.append((member, cut(roll(part, grid, -shift), grid, bounds[member]) if self.whole else part))
        return [part for _, part in sorted(made, key=lambda one: one[0])], outcome

    def rows_of(self, tokens: Tokens, members: Sequence[int], size: tuple[int, int]) -> Tokens:
        """The tokens of a batch that has these subjects' rows one behind the other, at a size of their own."""
        key = ("rows", *members, size)
        if key not in tokens.cache:
            count, rows = tokens.places_BCHW.shape[1], len(tokens.words)
            owners = torch.tensor(members).repeat_interleave(rows)
            places = F.one_hot(owners, count)[:, :, None, None].expand(-1, -1, *size).to(tokens.places_BCHW)
            words = [words_of(row, member) for member in members for row in tokens.words]
            tokens.cache[key] = Tokens(places, words, None, tokens.multiple, length=len(words[0].owners))
        return tokens.cache[key]


def words_of(words: Words, subject: int) -> Words:
    """One subject's words, or filling, alone."""
    own = words.owners == subject
    read = int(own[: words.read].sum())
    return Words(words.states[own.to(words.states.device)], words.owners[own], read, words.wanted)


def own_words(value_BL: torch.Tensor, words: Sequence[Words], members: Sequence[int]) -> torch.Tensor:
    """Of words, or their mask, (B, L, ...) those of each of these subjects, one batch behind the other."""
    rows = [
        row[: len(own.owners)][(own.owners == member).to(row.device)]
        for member in members
        for row, own in zip(value_BL, words, strict=True)
    ]
    return torch.stack(rows)


@contextmanager
def subjects_apart(denoiser: nn.Module, masked: MaskedDenoiser, steps: int) -> Iterator[Callable[..., None]]:
    """Within the block the denoiser has subjects apart, each in its part of the image; gives what is to be called behind every step."""
    hooked = "forward" in vars(denoiser)  # a part that comes only while it is at work has a forward of its own
    signature = inspect.signature(type(denoiser).forward)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    apart = Apart(denoiser.forward, masked, signature)
    left = max(1, round(WHOLE_SHARE * steps))

    def on_step(*_: Any) -> None:
        nonlocal left
        left -= 1
        apart.whole = left > 0

    in_rows = (
        masked.family.words_first is None
    )  # of which none has more than one subject, so that there is nothing to hold back
    masked.holds_attention = in_rows
    denoiser.forward = apart
    try:
        with nullcontext() if in_rows else SubjectAttention(masked):
            yield on_step
    finally:
        del denoiser.forward
        if hooked:
            denoiser.forward = apart.forward
