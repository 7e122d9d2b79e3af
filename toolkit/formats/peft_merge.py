"""Merging adapters by PEFT's own methods: the baselines that composition is measured against."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from ..adapters.attach import remove_adapters
from ..adapters.fold import Folded, fold
from ..core.errors import UserError, did_you_mean
from .write import Part, peft_state

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (
    "linear", "cat", "svd", *PRUNING, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip


def check_merge(method: str) -> None:
    """Raises UserError for a method that PEFT does not have."""
    if method not in METHODS:
        raise UserError(f"--merge {method}: PEFT has no such method.{did_you_mean(method, METHODS)}")


def peft_merge(
    model: nn.Module, sources: Sequence[Folded], weights: Sequence[float], method: str, *, density: float, seed: int = 0
) -> Folded:
    """The sources, each plain LoRA, merged by PEFT's add_weighted_adapter; the model is left as it was.

    density: share of the values that the pruning methods keep. seed: of the methods that drop at random.

    Raises:
        UserError: when PEFT refuses, for example linear with different ranks.
    """
    check_merge(method)
    torch.manual_seed(seed)
    names = [f"source{number}" for number in range(len(sources))]
    pruning = {"density": density} if method.removesuffix("_svd") in PRUNING else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            add_merged_adapter(model, names, sources, list(weights), method, pruning)
        return fold(model, "merged")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--merge {method}: PEFT refuses: {error}") from error
    finally:
        remove_adapters(model)


def add_merged_adapter(
    model: nn.Module, names: list[str], sources: Sequence[Folded], weights: list[float], method: str, pruning: dict
) -> None:
    """Puts the sources on the model as LoRA adapters of these names, and their merge as the adapter 'merged'."""
    wrapped = None
    for name, folded in zip(names, sources, strict=True):
        state, config = peft_state(Part(model, folded, name))
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            wrapped.add_adapter(name, config)
        state = {f"base_model.model.{key}": value for key, value in state.items()}
        set_peft_model_state_dict(wrapped, state, adapter_name=name)
    assert wrapped is not None
    wrapped.add_weighted_adapter(names, weights, "merged", combination_type=method, **pruning)  # type: ignore[operator]
