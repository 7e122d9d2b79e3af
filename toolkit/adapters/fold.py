"""The fold: an adapter that is linear in its input leaves as one Change per layer, exactly.

The strength at which it was trained is baked in, so that alpha = rank in every format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.peanut.layer import PeanutLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.change import Change
from ..core.errors import UserError
from .attach import adapter_layers
from .base import AdapterLayer

Folded = dict[str, Change]  # layer name -> its change, fp32 on the CPU


def has_adapter(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the layer has this adapter."""
    if isinstance(layer, AdapterLayer):
        return layer.has_adapter(adapter)
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def fold(model: nn.Module, adapter: str = "default") -> Folded:
    """The change of every adapted layer; of a model without numbers (torch's meta device) what kind of change each is.

    Raises:
        UserError: for an adapter that is not linear.
    """
    folded: Folded = {}
    for name, layer in adapter_layers(model).items():
        if not has_adapter(layer, adapter):
            continue
        if isinstance(layer, AdapterLayer):
            try:
                folded[name] = to_cpu(layer.fold(adapter))
            except ValueError as error:
                raise UserError(str(error)) from error
        elif isinstance(layer, LoraLayer) and not layer.use_dora.get(adapter):
            folded[name] = to_cpu(fold_lora(layer, adapter))
        elif isinstance(layer, PeanutLayer):
            folded[name] = to_cpu(fold_peanut(layer, adapter))
        else:
            folded[name] = to_cpu(Change(dense=merged_difference(layer, adapter)))
    return folded


def fold_lora(layer: LoraLayer, adapter: str) -> Change:
    """PEFT's plain LoRA."""
    up, scaling = layer.lora_B[adapter], layer.scaling[adapter]
    bias = getattr(up, "bias", None)
    return Change(
        down=layer.lora_A[adapter].weight.detach().float().flatten(1),
        up=up.weight.detach().float().flatten(1) * scaling,
        bias=None if bias is None else bias.detach().float() * scaling,
    )


@torch.no_grad()
def fold_peanut(layer: Any, adapter: str) -> Change:
    """PEFT's PEANuT: its network makes the lower factor of the frozen weight, and its last layer is the upper one."""
    up = layer.peanut_B[adapter]
    layer.peanut_B[adapter] = nn.Identity()
    try:
        return Change(down=layer.get_delta_weight(adapter).float(), up=up.weight.detach().float())
    finally:
        layer.peanut_B[adapter] = up


@torch.no_grad()
def merged_difference(layer: BaseTunerLayer, adapter: str) -> torch.Tensor:
    """What merging one of PEFT's own methods (DoRA, LoHa, LoKr, OFT, ...) adds to the weight, (out, in * kernel), fp32."""
    base: Any = layer.get_base_layer()
    before = base.weight.data
    base.weight.data = before.float().clone()
    try:
        layer.merge(adapter_names=[adapter])
        difference = base.weight.data - before.float()
    finally:
        layer.merged_adapters.clear()
        base.weight.data = before
    return difference.flatten(1)


def nearest_change(layer: BaseTunerLayer, adapter: str) -> Change | None:
    """The change that a layer's variant says is nearest to what it does, at strength 1; None where it says none."""
    if not isinstance(layer, AdapterLayer) or not layer.has_adapter(adapter):
        return None
    change = layer.nearest_change(adapter)
    return None if change is None else change.scale(layer.initial_scaling(adapter))


def to_cpu(change: Change) -> Change:
    """The change in fp32 (or finer) in main memory; of a model without numbers (meta) its shapes."""
    tensors = {key: value.detach() for key, value in vars(change).items() if value is not None}
    return replace(change, **{key: t if t.is_meta else t.cpu().contiguous() for key, t in tensors.items()})


def base_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The frozen weight (out, in * kernel)."""
    return layer.base_weight() if isinstance(layer, AdapterLayer) else layer.get_base_weight().flatten(1)


@torch.no_grad()
def is_dead(model: nn.Module, adapter: str = "default") -> bool:
    """True when the adapter changes nothing at all, as when its up-matrices are all still zero."""
    try:
        return all(change.is_zero for change in fold(model, adapter).values())
    except UserError:
        return all(ignores_input(layer, adapter) for layer in adapter_layers(model).values())


def ignores_input(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the adapted layer gives what its base layer gives, tried on noise in eval mode where no change stands for what it does."""
    change = nearest_change(layer, adapter)
    if change is not None:
        return change.is_zero
    training = layer.training  # type: ignore[attr-defined]
    layer.eval()  # type: ignore[attr-defined]
    base: Any = layer.get_base_layer()
    shape = (4, layer.in_features, *getattr(base, "kernel_size", ()))  # type: ignore[attr-defined]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(next(layer.parameters()).device, next(layer.parameters()).dtype)  # type: ignore[attr-defined]
    same = torch.equal(layer(x), base(x))  # type: ignore[operator]
    layer.train(training)  # type: ignore[attr-defined]
    return same
