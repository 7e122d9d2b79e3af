"""A layer's own factors, cut and stacked by rows of the weight.

Exact for LoRA, DoRA with a magnitude for each output, LoHa and whole changes.

Files of other tools keep several of our layers as one (q, k and v below each other), or one of theirs is several of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..core.errors import UserError
from .layer_changes import swap_halves

BLOCKS = {"up": "down", "hada_w1_a": "hada_w1_b", "hada_w2_a": "hada_w2_b"}
"""Factors with the rows of the weight, and the ones behind them: stacked as blocks on a diagonal."""
ROWS = ("magnitude", "diff", "bias")
"""Tensors with the rows of the weight alone."""
SCALED = ("up", "hada_w1_a", "lokr_w1")
"""The factor that a scale can be multiplied into, the first that is there."""


@dataclass(frozen=True)
class Factors:
    """A layer's tensors by role (methods.py), in fp32 and without alpha, and its scale."""

    tensors: dict[str, torch.Tensor]
    scale: float
    rank: int | None

    def baked(self) -> Factors:
        """The same at scale 1."""
        if self.scale == 1:
            return self
        role = next((role for role in SCALED if role in self.tensors), "")
        return Factors(self.tensors | ({role: self.tensors[role] * self.scale} if role else {}), 1.0, self.rank)


def check_rows(factors: Factors) -> None:
    """Raises UserError, half a sentence, for factors that cannot be cut or stacked by rows."""
    other = factors.tensors.keys() - {*BLOCKS, *BLOCKS.values(), *ROWS}
    if other:
        raise UserError(f"holds {', '.join(sorted(other))}, which cannot be cut or stacked by rows")


def cut_rows(factors: Factors, counts: Sequence[int]) -> list[Factors]:
    """The factors of layers of so many rows each, which a file keeps as one.

    Raises:
        UserError: half a sentence, where it cannot be done exactly.
    """
    check_rows(factors)
    rows = {role: t.split(list(counts)) for role, t in factors.tensors.items() if role in (*BLOCKS, *ROWS)}
    rest = {role: t for role, t in factors.tensors.items() if role not in rows}
    cut = [rest | {role: parts[number] for role, parts in rows.items()} for number in range(len(counts))]
    return [drop_unused(replace(factors, tensors=tensors).baked()) for tensors in cut]


def drop_unused(factors: Factors) -> Factors:
    """LoRA's factors without those of its rank that are all zero in `up`, at scale 1."""
    if "up" not in factors.tensors:
        return factors
    up, down = factors.tensors["up"], factors.tensors["down"]
    used = up.flatten(2).any(-1).any(0) if up.dim() > 2 else up.any(0)
    used[0] |= not bool(used.any())
    return Factors(factors.tensors | {"up": up[:, used], "down": down[used]}, factors.scale, int(used.sum()))


def stack_rows(
    pieces: Sequence[Factors | None], counts: Sequence[int], row_norms: Callable[[int], torch.Tensor]
) -> Factors:
    """The factors of one layer whose rows are those of several; None is one that nothing changes.

    row_norms: number of a piece -> norms (out,) of the base's rows, the magnitude of rows that nothing changes.

    Raises:
        UserError: half a sentence, where it cannot be done exactly.
    """
    there = [piece.baked() for piece in pieces if piece is not None]
    for piece in there:
        check_rows(piece)
    kinds = {frozenset(piece.tensors) - {"bias"} for piece in there}
    if len(kinds) > 1:
        raise UserError("holds layers of different methods, which another tool's file keeps as one")
    (roles,) = kinds
    rank, total, tensors = sum(piece.rank or 0 for piece in there), sum(counts), {}
    for outer, inner in BLOCKS.items():
        if outer in roles:
            tensors[inner] = torch.cat([piece.tensors[inner] for piece in there])
            tensors[outer] = there[0].tensors[outer].new_zeros(total, rank, *there[0].tensors[outer].shape[2:])
    for role in roles & {*ROWS} | {"bias" for piece in there if "bias" in piece.tensors}:
        shape = next(piece.tensors[role].shape[1:] for piece in there if role in piece.tensors)
        tensors[role] = torch.zeros(total, *shape)
    row = column = 0
    for number, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        below = slice(row, row + count)
        if piece is None and "magnitude" in tensors:
            tensors["magnitude"][below] = row_norms(number)
        elif piece is not None:
            own = piece.baked().tensors
            for outer in BLOCKS.keys() & own.keys():
                tensors[outer][below, column : column + (piece.rank or 0)] = own[outer]
            for role in own.keys() & {*ROWS}:
                tensors[role][below] = own[role]
            column += piece.rank or 0
        row += count
    return Factors(tensors, 1.0, rank or None)


def swap_factors(factors: Factors) -> Factors:
    """The factors with the two halves of their rows the other way round.

    Raises:
        UserError: half a sentence, where it cannot be done exactly.
    """
    check_rows(factors)
    swapped = {
        role: swap_halves(tensor) if role in (*BLOCKS, *ROWS) else tensor for role, tensor in factors.tensors.items()
    }
    return replace(factors, tensors=swapped)
