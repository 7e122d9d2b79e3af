"""Steps between attaching adapters and the first training step: start values from the data, layers without a part taken off."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...toolkit.adapters.attach import calibrate, remove_unused_adapters


def calibrate_adapters(module: nn.Module, parts: Mapping[str, nn.Module], batch: dict[str, torch.Tensor]) -> None:
    """Lets adapters that start from their layers' outputs see a batch. module: forward(batch), left in training mode."""
    for part in parts.values():
        calibrate(part, lambda: module.eval()(batch))
    module.train()


def drop_unused_layers(
    module: nn.Module, parts: Mapping[str, nn.Module], batch: dict[str, torch.Tensor]
) -> dict[str, list[str]]:
    """Takes the adapter off layers that have no part in the loss, found by one backward pass; their names by part."""
    module(batch).mean().backward()
    unused = {name: remove_unused_adapters(part) for name, part in parts.items()}
    module.zero_grad(set_to_none=True)
    return unused
