"""The fold: an adapter that is linear in its input leaves as plain LoRA, exactly.

For each layer: delta weight = up @ down, with alpha / rank baked into `up`, so that alpha = rank in every format.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import UserError
from .attach import adapter_layers
from .base import AdapterLayer

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer name -> down (r, in), up (out, r), fp32


def fold(model: nn.Module, adapter: str = "default") -> Factors:
    """Plain LoRA factors of every adapted layer.

    Raises:
        UserError: for an adapter that no plain LoRA equals.
    """
    factors: Factors = {}
    for name, layer in adapter_layers(model).items():
        if isinstance(layer, AdapterLayer) and layer.has(adapter):
            down, up = layer.fold(adapter)
        elif isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            if layer.use_dora.get(adapter):
                raise UserError("DoRA is not linear in its factors and has no exact plain LoRA; export it with PEFT.")
            down = layer.lora_A[adapter].weight.detach().float().flatten(1)
            up = layer.lora_B[adapter].weight.detach().float().flatten(1) * layer.scaling[adapter]
        else:
            continue
        factors[name] = down.cpu().contiguous(), up.cpu().contiguous()
    return factors


def shaped(model: nn.Module, factors: Factors) -> Factors:
    """The factors in the shape that LoRA files store: 4-d kernels for convolutions, as they are for linear layers."""
    modules = dict(model.named_modules())
    out: Factors = {}
    for name, (down, up) in factors.items():
        base = modules[name]
        base = base.get_base_layer() if hasattr(base, "get_base_layer") else base  # type: ignore[operator]
        if isinstance(base, nn.Conv2d):
            down, up = down.view(-1, *base.weight.shape[1:]), up[:, :, None, None]
        out[name] = down.contiguous(), up.contiguous()
    return out


def delta_weights(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The change of every adapted weight, (out, in * kernel), fp32."""
    return {name: up @ down for name, (down, up) in fold(model, adapter).items()}


def is_dead(model: nn.Module, adapter: str = "default") -> bool:
    """True when the adapter changes nothing at all, as when its up-matrices are all still zero."""
    return all(not up.any() or not down.any() for down, up in fold(model, adapter).values())
