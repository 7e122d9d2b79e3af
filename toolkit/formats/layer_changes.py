"""The changes that a file makes to a pipeline's layers, once it is known where its own are (match.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..core.change import Change
from ..core.errors import UserError
from .match import Match, Place
from .methods import Frozen, MisfitError, layer_change
from .read import LoraFile

ROWS = ("up", "rows", "mask_up", "bias", "dense")
"""Tensors of a change whose first dimension is the layer's outputs."""


def widen_dense(change: Change) -> Change:
    """The change with a whole matrix (out, in) in fp32."""
    return change if change.dense is None else replace(change, dense=change.dense.float())


@torch.no_grad()
def matched_changes(
    file: LoraFile, match: Match, model: Any, hold: Callable[[Change], Change] = widen_dense
) -> Iterator[tuple[str, str, Change]]:
    """(part, layer, its change) of every layer that the file changes.

    hold: what is kept of each change as soon as it is read, since all whole matrices of a large file in fp32 may not fit the memory.

    Raises:
        UserError: for tensors that do not fit, are missing, or hold NaN or infinity; the sentence names the layer.
    """
    from ..adapters.base import is_projection

    for layer, place in match.places.items():
        part = getattr(model, place.part)
        modules = [part.get_submodule(name) for name in place.layers]
        change = place_change(file, layer, place, modules)
        if (
            change.bias is not None
            and "diff_b" in file.layers[layer]
            and any(module.bias is None for module in modules)
        ):
            raise UserError(
                f"{file.path}: {layer} brings a bias (diff_b), and {place.layers[0]} has none in this base model; the file was made for "
                "another base, or by a tool that writes biases of nothing."
            )
        if change.bias is not None and not all(is_projection(module) or module.bias is not None for module in modules):
            raise UserError(f"{file.path}: {layer} brings a bias, and {place.layers[0]} has none in this base model.")
        rows = own_rows(change, place, modules)
        # Rows of nothing are a layer that was stacked with others and not trained.
        changing = [(name, own) for name, own in zip(place.layers, rows, strict=True) if changes_rows(own)]
        for name, own in changing or zip(place.layers, rows, strict=True):
            yield place.part, name, hold(own)


def place_change(file: LoraFile, layer: str, place: Place, modules: list[Any]) -> Change:
    """The change of the layers at a place, in the order of the file's rows."""
    if fault := file.fault(layer):
        raise UserError(f"{file.path}: {layer} {fault}.")
    frozen = frozen_weight(modules, swapped=place.swapped)
    scale = file.scale(layer, place.part, place.layers[0])
    try:
        change = layer_change(file.roles(layer), scale, frozen)
    except MisfitError as error:
        raise UserError(f"{file.path} was made for another base model: {place.layers[0]} {error} ({layer}).") from error
    except UserError as error:
        raise UserError(f"{file.path}: {layer} {error}.") from error
    return change


def own_rows(change: Change, place: Place, modules: list[Any]) -> list[Change]:
    """The change of a file's layer as those of the pipeline's layers at its place."""
    change = swap_rows(change) if place.swapped else change
    return split_change(change, [len(module.weight) for module in modules])


def split_change(change: Change, counts: list[int]) -> list[Change]:
    """The change cut into those of layers of so many outputs each; factors that a layer's rows do not use are left out."""
    rows = {name: tensor.split(counts) for name in ROWS if (tensor := getattr(change, name)) is not None}
    cut = [replace(change, **{name: parts[number] for name, parts in rows.items()}) for number in range(len(counts))]
    return [drop_unused_rank(one) for one in cut]


def swap_rows(change: Change) -> Change:
    """The change with the two halves of its outputs the other way round."""
    return replace(change, **{name: swap_halves(t) for name in ROWS if (t := getattr(change, name)) is not None})


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The two halves of the rows (out, ...), the other way round."""
    return torch.cat(tensor.chunk(2)[::-1])


def drop_unused_rank(change: Change) -> Change:
    """The change without those of its rank whose up factors are all zero."""
    if change.up is None or change.down is None:
        return change
    used = change.up.any(0)
    if bool(used.all()):
        return replace(change, up=change.up.contiguous())
    used[0] |= not bool(used.any())
    return replace(change, up=change.up[:, used].contiguous(), down=change.down[used].contiguous())


def changes_rows(change: Change) -> bool:
    """Whether any of its rows is more than nothing; asked of the factors, not of their product."""
    tensors = [tensor for name in ROWS if (tensor := getattr(change, name)) is not None]
    return any(bool(tensor[:1].any()) for tensor in tensors) or any(bool(tensor.any()) for tensor in tensors)


def frozen_weight(modules: list[Any], *, swapped: bool = False) -> Frozen:
    """The weights of layers that a file keeps as one, below each other in its rows."""
    first = tuple(modules[0].weight.shape)
    shape = (sum(len(module.weight) for module in modules), *first[1:])

    def load() -> torch.Tensor:
        weight = modules[0].weight if len(modules) == 1 else torch.cat([module.weight for module in modules])
        return swap_halves(weight) if swapped else weight

    return Frozen(shape, load)


def scale_notes(file: LoraFile) -> list[str]:
    """What users must know of where the scale was found."""
    scales = file.scales
    silent = any("alpha" not in roles and file.rank(layer) for layer, roles in file.layers.items())
    if scales.header_alpha is None or scales.parts or not silent:
        return []
    return [
        f"{file.path.name}: alpha is said in the header alone ({scales.header_key} = {scales.header_alpha:g}) and is followed here; most "
        "other readers overlook it and take scale 1."
    ]
