"""A denoiser's layers as the code that it was first published with calls them: so do kohya, ComfyUI, ai-toolkit and musubi.

A family's file holds the table. Where the original keeps several of our layers in one (q, k and v of an attention), their outputs stand
below each other in its rows; where it keeps the halves of a modulation (scale, shift) the other way round, the entry says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class OriginalLayer:
    """One layer of the original, and which of ours it is."""

    layers: tuple[str, ...]
    """Names of our layers, in the order of its rows."""
    swapped: bool = False
    """Whether its two halves of rows stand the other way round."""


Table = dict[str, tuple[str, ...] | str]
"""Original name -> our names, with the block's number as {}."""


def block_numbers(pattern: str, names: Iterable[str]) -> list[str]:
    """The numbers for which there is a layer of this pattern."""
    found = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return [match[1] if match.re.groups else "" for name in names if (match := found.fullmatch(name))]


def expand_table(table: Table, model: nn.Module, swapped: Iterable[str] = ()) -> dict[str, OriginalLayer]:
    """The table's rows for all blocks that a model has; rows of layers that it lacks are left out.

    swapped: original names (with {}) of layers whose halves stand the other way round.
    """
    names, wrong_way = dict(model.named_modules()), set(swapped)
    found: dict[str, OriginalLayer] = {}
    for theirs, ours in table.items():
        ours = (ours,) if isinstance(ours, str) else ours
        for number in block_numbers(ours[0], names):
            layers = tuple(name.format(number) for name in ours)
            if all(name in names for name in layers):
                found[theirs.format(number)] = OriginalLayer(layers, theirs in wrong_way)
    return found


def attention_rows(theirs: str, ours: str, inner: tuple[str, ...], outer: str, proj: str = "proj") -> Table:
    """The rows of an attention whose q, k and v are one layer."""
    return {f"{theirs}.qkv": tuple(f"{ours}.{name}" for name in inner), f"{theirs}.{proj}": f"{ours}.{outer}"}
