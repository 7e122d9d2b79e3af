"""Frozen layers that images are drawn with, where they are not those that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...toolkit.adapters.quantized import find_backend
from ..engine.block_swap import release_blocks


@dataclass(eq=False)
class DrawingWeights:
    """Layers that wait while a denoiser is trained and take the place of its own, to the bit, while images are drawn.

    A layer that is whole waits in main memory, a quantised one beside the one at work: neither takes memory of the device to change
    places, so that nothing can fail between two of them.
    """

    denoiser: nn.Module
    waiting: dict[str, nn.Module] = field(default_factory=dict)
    """Name of the layer before any adapter was attached -> the one that images are drawn with."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the denoiser has the weights that images are drawn with."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Each layer that waits changes places with the one at work."""
        release_blocks(self.denoiser)
        for name, waiting in self.waiting.items():
            exchange_layers(self.layer(name), waiting)

    @property
    def waiting_quantized(self) -> list[nn.Module]:
        """The layers that wait on the device."""
        return [layer for layer in self.waiting.values() if find_backend(layer, None) is not None]

    def layer(self, name: str) -> nn.Module:
        """The frozen layer of this name, whatever adapter is on it."""
        found = self.denoiser.get_submodule(name)
        return found.get_base_layer() if isinstance(found, BaseTunerLayer) else found


def exchange_layers(one: nn.Module, other: nn.Module) -> None:
    """Gives each of two layers of a kind what the other holds. Whole tensors stay where they are, since compiled code knows them."""
    if find_backend(one, None) is not None:
        one.__dict__, other.__dict__ = other.__dict__, one.__dict__  # weights, scales, and the state beside them
        return
    for own, others in zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True):
        kept = own.to(others.device, copy=True)
        own.copy_(others)
        others.copy_(kept)


def drawing(weights: DrawingWeights | None) -> Any:
    """`in_place`, where there are such weights."""
    return nullcontext() if weights is None else weights.in_place()
