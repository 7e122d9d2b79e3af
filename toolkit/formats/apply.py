"""A LoRA file's changes added to a pipeline's weights."""

from __future__ import annotations

from typing import Any

import torch

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
        for name, change in folded.items():
            module: Any = getattr(pipe, part).get_submodule(name)
            frozen = module.weight.detach().float().reshape(len(module.weight), -1)
            delta = change.delta_weight(frozen.cpu()).to(frozen.device)
            module.weight += delta.view(module.weight.shape).to(module.weight.dtype)
            if change.bias is not None:
                module.bias += change.bias.to(module.bias)
    return changes
