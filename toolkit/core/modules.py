"""Modules of a model, replaced by name."""

from __future__ import annotations

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module of this name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
