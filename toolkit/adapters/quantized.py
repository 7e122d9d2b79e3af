"""Quantised base layers (bitsandbytes, torchao): what PEFT's backends leave undone for reading weights and for an exact way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn


def find_backend(base: nn.Module, model: nn.Module | None) -> QuantizationBackend | None:
    """PEFT's way to read and write a quantised layer's weight; None for any other layer.

    torchao's needs to know how the model was quantised, which only its loader knows.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    again = getattr(getattr(quantizer, "quantization_config", None), "get_apply_tensor_subclass", refuse_requantize)
    return resolve_quantization_backend(base, get_apply_tensor_subclass=again)


def is_plain(base: nn.Module) -> bool:
    """Whether a layer is an nn.Linear with its weight in full. torchao's quantised layers are of that class, too."""
    return type(base) is nn.Linear and find_backend(base, None) is None


def refuse_requantize() -> Any:
    """Raises ValueError: nobody can say how to quantise a merged weight again."""
    raise ValueError(
        "The base was quantised with torchao behind its loader's back, so a merged weight cannot be quantised again: load it with "
        "from_pretrained(..., quantization_config=TorchAoConfig(...)), or do not merge."
    )


def unpack_cpu_weight(base: nn.Module) -> None:
    """Puts a 4-bit weight back into the order that dequantising expects.

    bitsandbytes reorders it for the CPU in the first forward pass in eval mode, and dequantises the reordered numbers to
    nonsense; reading the layer's state dict undoes the reordering.
    """
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()


@dataclass(frozen=True)
class WeightSnapshot:
    """A quantised weight, with the state that its layer holds beside it (8 bit)."""

    weight: Any
    codes: torch.Tensor | None
    scales: torch.Tensor | None

    @classmethod
    def capture(cls, base: nn.Module) -> WeightSnapshot:
        """What `restore` needs."""
        unpack_cpu_weight(base)
        state = getattr(base, "state", None)
        return cls(base.weight, getattr(state, "CB", None), getattr(state, "SCB", None))

    @contextmanager
    def restored_temporarily(self, base: Any) -> Iterator[None]:
        """The layer as it was, for the length of a with block."""
        now = WeightSnapshot.capture(base)
        self.restore(base)
        try:
            yield
        finally:
            now.restore(base)

    def restore(self, base: Any) -> None:
        """The layer as it was."""
        base.weight = self.weight
        if hasattr(self.weight, "bnb_quantized"):
            self.weight.bnb_quantized = True  # PEFT's backend clears it on the old weight, too
            base.quant_state = self.weight.quant_state
        if hasattr(base, "state"):
            base.state.CB, base.state.SCB = self.codes, self.scales
