"""Quantised base layers (bitsandbytes): what PEFT's backends leave undone for reading weights and for an exact way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def make_readable(base: nn.Module) -> None:
    """Puts a 4-bit weight back into the order that dequantising expects.

    bitsandbytes reorders it for the CPU in the first forward pass in eval mode, and dequantises the reordered numbers to
    nonsense; reading the layer's state dict undoes the reordering.
    """
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()


@dataclass(frozen=True)
class Kept:
    """A quantised weight, with the state that its layer holds beside it (8 bit)."""

    weight: Any
    codes: torch.Tensor | None
    scales: torch.Tensor | None

    @classmethod
    def of(cls, base: nn.Module) -> Kept:
        """What `put_back` needs."""
        make_readable(base)
        state = getattr(base, "state", None)
        return cls(base.weight, getattr(state, "CB", None), getattr(state, "SCB", None))

    @contextmanager
    def in_place(self, base: Any) -> Iterator[None]:
        """The layer as it was, for the length of a with block."""
        now = Kept.of(base)
        self.put_back(base)
        try:
            yield
        finally:
            now.put_back(base)

    def put_back(self, base: Any) -> None:
        """The layer as it was."""
        base.weight = self.weight
        if hasattr(self.weight, "bnb_quantized"):
            self.weight.bnb_quantized = True  # PEFT's backend clears it on the old weight, too
            base.quant_state = self.weight.quant_state
        if hasattr(base, "state"):
            base.state.CB, base.state.SCB = self.codes, self.scales
