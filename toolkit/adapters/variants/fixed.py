"""A change that is given and not trained: how the file of any other tool is put on a model, be it factors or a whole matrix.

    weight' = weight + up @ down + dense,  bias' = bias + bias_change

The config lists which tensors each layer has. Beside linear layers and convolutions it takes whatever has a weight (norms, embeddings):
such a layer is run with its changed weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer, is_projection


@dataclass
class FixedConfig(AdapterConfig):
    """Config of a given change."""

    shapes: dict[str, dict[str, list[int]]] = field(
        default_factory=dict, metadata={"help": "Layer -> tensor (down, up, dense, bias) -> shape."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = 1


class FixedLayer(AdapterLayer, name="fixed", config=FixedConfig, kind="RANKFOLD_FIXED", listed=False):
    """Any layer with a weight under a given change."""

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        base: Any = self.get_base_layer()
        if is_projection(base):
            return super().sizes()
        shape = base.weight.shape
        sizes = (math.prod(shape[1:]), shape[0])
        return sizes, sizes

    def init_tensors(self, config: FixedConfig, r: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape) for name, shape in config.shapes.get(self.layer_name, {}).items()}

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        return Change(**tensors)

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return super().as_matrix(weight) if is_projection(self.get_base_layer()) else weight.reshape(len(weight), -1)

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return super().as_stored(matrix) if is_projection(base) else matrix.reshape(base.weight.shape)

    def forward_with_adapters(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if is_projection(base):
            return super().forward_with_adapters(adapters, x, *args, **kwargs)
        total = Change.sum([self.scaled_change(adapter) for adapter in adapters])
        changed = {"weight": self.changed_weight(base.weight, total)}
        if total.bias is not None:
            changed["bias"] = base.bias + total.bias.to(base.bias.dtype)
        return torch.func.functional_call(base, changed, (x, *args), kwargs)

    def changed_weight(self, weight: nn.Parameter, change: Change) -> torch.Tensor:
        """The base's weight under a change, in its dtype and shape."""
        frozen = self.as_matrix(weight).float()
        return self.as_stored(frozen + change.delta_weight(frozen)).to(weight.dtype)
