"""An adapter's changes added to a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.fold import Folded
from .layer_changes import matched_changes
from .match import match_pipeline
from .read import LoraFile


@torch.no_grad()
def apply_to_pipeline(file: LoraFile, pipe: Any, *, ignore_unused: bool = False) -> dict[str, Folded]:
    """Adds the file's changes to a pipeline's weights; returns them by part and layer.

    Raises:
        UserError: when the file was made for another base, or cannot be read.
    """
    match = match_pipeline(file, pipe, ignore_unused=ignore_unused)
    changes: dict[str, Folded] = {}
    for part, name, change in matched_changes(file, match, pipe):
        changes.setdefault(part, {})[name] = change
    for part, folded in changes.items():
        add_to_weights(getattr(pipe, part), folded)
    return changes


@torch.no_grad()
def add_to_weights(model: nn.Module, folded: Folded) -> None:
    """Adds changes to the weights of a model's layers, in fp32 and rounded once to the weight's dtype."""
    for name, change in folded.items():
        module: Any = model.get_submodule(name)
        frozen = module.weight.detach().float().reshape(len(module.weight), -1)
        changed = frozen + change.delta_weight(frozen.cpu()).to(frozen.device)
        module.weight.copy_(changed.view(module.weight.shape))
        if change.bias is not None:
            module.bias += change.bias.to(module.bias)
