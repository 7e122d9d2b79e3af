"""The fold: an adapter that is linear in its input leaves as one Change a layer, exactly.

The strength at which it was trained is baked in, so that alpha = rank in every format.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import UserError
from .attach import adapter_layers
from .base import AdapterLayer
from .change import Change

Folded = dict[str, Change]  # layer name -> its change, fp32 on the CPU


def fold(model: nn.Module, adapter: str = "default") -> Folded:
    """The change of every adapted layer.

    Raises:
        UserError: for an adapter that is not linear.
    """
    folded: Folded = {}
    for name, layer in adapter_layers(model).items():
        if isinstance(layer, AdapterLayer) and layer.has(adapter):
            try:
                folded[name] = on_cpu(layer.fold(adapter))
            except ValueError as error:
                raise UserError(str(error)) from error
        elif isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            folded[name] = on_cpu(fold_lora(layer, adapter))
        elif not isinstance(layer, AdapterLayer | LoraLayer):
            raise UserError(f"{type(layer).__name__} is folded by PEFT alone; use merge_and_unload or PEFT's own file.")
    return folded


def fold_lora(layer: LoraLayer, adapter: str) -> Change:
    """PEFT's plain LoRA."""
    if layer.use_dora.get(adapter):
        raise UserError("DoRA is not linear in its factors and has no exact plain LoRA; export it with PEFT.")
    up, scaling = layer.lora_B[adapter], layer.scaling[adapter]
    bias = getattr(up, "bias", None)
    return Change(
        down=layer.lora_A[adapter].weight.detach().float().flatten(1),
        up=up.weight.detach().float().flatten(1) * scaling,
        bias=None if bias is None else bias.detach().float() * scaling,
    )


def on_cpu(change: Change) -> Change:
    """The change in fp32 (or finer) in main memory."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in vars(change).items() if value is not None}
    return replace(change, **tensors)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Shape of the layer's base weight."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]
    return tuple(base.weight.shape)


def lora_factors(model: nn.Module, folded: Folded) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) in the shapes that LoRA files store: 4-d kernels for convolutions, as they are for linear layers.

    Raises:
        UserError: naming the first layer whose change no LoRA factors say.
    """
    modules, out = dict(model.named_modules()), {}
    for name, change in folded.items():
        if not change.is_low_rank:
            raise UserError(f"The change of {name} is of full rank and has no exact plain LoRA.")
        shape = shape_of(modules[name])
        down, up = change.down, change.up
        if down is None or up is None:
            down, up = torch.zeros(1, int(torch.tensor(shape[1:]).prod())), torch.zeros(shape[0], 1)
        if len(shape) == 4:
            down, up = down.view(-1, *shape[1:]), up[:, :, None, None]
        out[name] = down.contiguous(), up.contiguous()
    return out


def delta_weights(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The change of every adapted weight, (out, in * kernel), fp32."""
    layers = adapter_layers(model)
    return {
        name: change.delta_weight(base_weight(layers[name]).float().cpu()) for name, change in fold(model, adapter).items()
    }


def base_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The frozen weight (out, in * kernel)."""
    return layer.base_weight() if isinstance(layer, AdapterLayer) else layer.get_base_weight().flatten(1)


@torch.no_grad()
def is_dead(model: nn.Module, adapter: str = "default") -> bool:
    """True when the adapter changes nothing at all, as when its up-matrices are all still zero."""
    try:
        return all(change.is_nothing for change in fold(model, adapter).values())
    except UserError:
        return all(ignores_input(layer) for layer in adapter_layers(model).values())


def ignores_input(layer: BaseTunerLayer) -> bool:
    """Whether the adapted layer gives what its base layer gives, tried on noise in eval mode."""
    training = layer.training  # type: ignore[attr-defined]
    layer.eval()  # type: ignore[attr-defined]
    base = layer.get_base_layer()
    shape = (4, base.in_features) if hasattr(base, "in_features") else (4, base.in_channels, *base.kernel_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(next(layer.parameters()).device, next(layer.parameters()).dtype)  # type: ignore[attr-defined]
    same = torch.equal(layer(x), base(x))  # type: ignore[operator]
    layer.train(training)  # type: ignore[attr-defined]
    return same
