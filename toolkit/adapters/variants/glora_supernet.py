"""The supernet of GLoRA's structure search: all choices of a layer in one set of tensors, one choice at work at a time.

Smaller choices are parts of larger ones (weight entanglement, Chavan et al. 2023, arXiv 2306.07967): a vector is the first column
of the up factor, a constant its first number. In the matmul form A's vector and constant scale rows of the weight, which no part of
its up factor can say, so they have a column of their own.

What is at work in which layer is the path. It is set from outside, never drawn in the forward pass: so gradient checkpointing runs
a layer again as it was, and a resumed run, and every process of a run, takes the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...core.change import Change
from ..attach import adapter_layers
from .glora import CHOICES, GloraConfig, GloraLayer

Choices = tuple[str, ...]  # of A, B, C, D, E
Path = dict[str, Choices]  # layer name -> its choices
LARGEST: Choices = ("lora", "lora", "lora", "vector", "vector")


@dataclass
class GloraSupernetConfig(GloraConfig):
    """Config of the supernet; r is the rank of every low-rank choice, structure is not used."""


class GloraSupernetLayer(
    GloraLayer, name="supernet", config=GloraSupernetConfig, kind="RANKFOLD_GLORA_SUPERNET", listed=False
):
    """A linear layer or a convolution with all of GLoRA's choices."""

    def __init__(self, base_layer: nn.Module, *about: Any) -> None:
        super().__init__(base_layer, *about)
        self.path: dict[str, Choices] = {}  # adapter -> choices
        self.pieces: dict[tuple[str, str], Change] = {}  # of (part, choice), while nothing is trained

    def init_tensors(self, config: GloraSupernetConfig, r: int) -> dict[str, torch.Tensor]:
        largest: dict[str, Any] = dict(zip(CHOICES, LARGEST, strict=True))
        tensors = super().init_tensors(replace(config, structure={}, **largest), r)
        if config.form == "matmul":
            tensors["a_rows"] = torch.zeros(self.fan_out, 1)
        return tensors

    def lr_multipliers(self, config: GloraSupernetConfig) -> dict[str, float]:
        return super().lr_multipliers(config) | {"a_rows": config.a_rate}

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        choices = self.path.get(adapter, LARGEST)
        if not self.pieces:
            return super().change(adapter, select_tensors(tensors, choices))
        return Change.sum([self.pieces[piece] for piece in zip(CHOICES, choices, strict=True)])

    @torch.no_grad()
    def compute_piece(self, adapter: str, part: str, choice: str) -> Change:
        """What one choice of one part changes; a path's change is the sum of its five."""
        return super().change(adapter, select_tensors(self.tensors(adapter), single_choice(part, choice)))


def select_tensors(tensors: dict[str, torch.Tensor], choices: Choices) -> dict[str, torch.Tensor]:
    """A layer's tensors as GloraLayer has them under these choices: parts of the supernet's."""
    picked: dict[str, torch.Tensor] = {}
    for part, choice in zip(CHOICES, choices, strict=True):
        if part in ("d", "e"):
            if choice != "none" and part in tensors:
                picked[part] = tensors[part] if choice == "vector" else tensors[part][:1]
            continue
        if choice == "lora":
            picked |= {name: tensors[name] for name in (f"{part}_up", f"{part}_down")}
        elif choice != "none":
            column = tensors["a_rows"] if part == "a" and "a_rows" in tensors else tensors[f"{part}_up"][:, :1]
            picked[f"{part}_up"] = column if choice == "vector" else column[:1]
    return picked


def single_choice(part: str, choice: str) -> Choices:
    """Choices of which all but one are none."""
    return tuple(choice if part == name else "none" for name in CHOICES)


@contextmanager
def cache_pieces(model: nn.Module, adapter: str = "default") -> Iterator[None]:
    """Within the block the supernet's tensors do not change, so each choice is worked out once and not for every path."""
    layers = supernet_layers(model).values()
    for layer in layers:
        layer.pieces = {
            (part, choice): layer.compute_piece(adapter, part, choice)
            for part, known in CHOICES.items()
            for choice in known
        }
    try:
        yield
    finally:
        for layer in layers:
            layer.pieces = {}


def supernet_layers(model: nn.Module) -> dict[str, GloraSupernetLayer]:
    """The supernet's layers by name."""
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, GloraSupernetLayer)}


def set_path(model: nn.Module, path: Path, adapter: str = "default") -> None:
    """Puts a path to work, in all layers that it names."""
    layers = supernet_layers(model)
    for name, choices in path.items():
        layers[name].path[adapter] = choices
