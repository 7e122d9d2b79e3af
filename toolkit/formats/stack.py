"""Changes of our layers as changes of the original code's, where several of ours are one: written out for readers of its names.

Stacking is exact: down factors one above the other, up factors on the diagonal. Reading cuts the rows again (source.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

from ..adapters.fold import Folded
from ..core.change import Change
from ..core.errors import UserError
from ..diffusion.families import family_of_denoiser
from ..diffusion.original_layers import OriginalLayer
from .layer_changes import ROWS, swap_rows


@dataclass(frozen=True)
class StackedChange:
    """The change of one layer of the original."""

    change: Change
    layers: tuple[str, ...]
    """Our layers, in the order of its rows."""
    swapped: bool


def original_layers(model: nn.Module) -> dict[str, OriginalLayer]:
    """The original's names of a denoiser's layers; {} where it has none of its own."""
    family = family_of_denoiser(model)
    return family.original_layers(model) if family else {}


def num_outputs(model: nn.Module, name: str) -> int:
    """Outputs of a layer."""
    return len(frozen_layer(model, name).weight)  # type: ignore[arg-type]


def frozen_layer(model: nn.Module, name: str) -> nn.Module:
    """A layer without its adapters."""
    layer = model.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


def stack_layers(model: nn.Module, folded: Folded, *, keep_own_names: bool) -> dict[str, StackedChange]:
    """Original layer -> its change.

    keep_own_names: whether a layer that the original has no name of its own for is called as ours.

    Raises:
        UserError: for a layer that has no name otherwise.
    """
    groups = original_layers(model)
    known = {name for original in groups.values() for name in original.layers}
    others = [name for name in folded if name not in known]
    if others and not keep_own_names:
        raise UserError(f"kohya's files have no name for the layer {others[0]}: use --format diffusers or peft.")
    stacked = {
        theirs: stack_changes(model, folded, original)
        for theirs, original in groups.items()
        if any(name in folded for name in original.layers)
    }
    return stacked | {name: StackedChange(folded[name], (name,), False) for name in others}


def stack_changes(model: nn.Module, folded: Folded, original: OriginalLayer) -> StackedChange:
    """One change of a layer whose outputs are those of several, each with its own change (or none)."""
    counts = [num_outputs(model, name) for name in original.layers]
    total, placed, start = sum(counts), [], 0
    for name, count in zip(original.layers, counts, strict=True):
        if (change := folded.get(name)) is not None:
            placed.append(pad_rows(change, start, total - start - count))
        start += count
    change = Change.sum(placed)
    return StackedChange(swap_rows(change) if original.swapped else change, original.layers, original.swapped)


def pad_rows(change: Change, above: int, below: int) -> Change:
    """The same change of a layer that has so many other outputs above and below these."""
    if not above and not below:
        return change
    wider = {
        name: F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (above, below))
        for name in ROWS
        if (tensor := getattr(change, name)) is not None
    }
    return replace(change, **wider)
