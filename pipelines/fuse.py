"""Adapters put into the weights for sampling, so that a step costs what it costs without any."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..toolkit.adapters.attach import adapter_layers_innermost_first
from ..toolkit.core.modules import replace_module
from ..toolkit.formats.adapter_folder import PARTS


@torch.no_grad()
def fuse_adapters(pipe: Any) -> Any:
    """Puts the active adapters of every fp32 layer into its weight, at their strengths; returns the pipeline.

    Layers with an adapter that is not linear keep it. So do layers in half precision: the rounding of their weights is as large as
    what many adapters change.
    """
    for part in PARTS:
        model = getattr(pipe, part, None)
        for name, layer in adapter_layers_innermost_first(model) if isinstance(model, nn.Module) else []:
            base: Any = layer.get_base_layer()
            if base.weight.dtype != torch.float32:
                continue
            if not layer.disable_adapters:
                make_room_for_bias(layer, base)
                try:
                    layer.merge()
                except ValueError:  # not linear: it has no weight
                    continue
            replace_module(model, name, base)
    return pipe


def make_room_for_bias(layer: Any, base: Any) -> None:
    """Gives a layer without a bias one of zeros where a LoRA of PEFT's brings a bias, which PEFT will not merge otherwise."""
    if base.bias is None and any(getattr(layer, "lora_bias", {}).values()):
        base.bias = nn.Parameter(base.weight.new_zeros(len(base.weight)), requires_grad=False)
