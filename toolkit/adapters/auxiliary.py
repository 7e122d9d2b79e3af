"""Auxiliary losses of adapters, handed to whoever computes the training loss.

    with auxiliary_losses() as auxiliary:
        loss = loss_of(model(batch))
    (loss + auxiliary.total()).backward()

A layer gives its loss to the innermost open collector and keeps nothing itself, so no graph outlives the step, and several
adapters and several calls are right by construction. Gradient checkpointing (use_reentrant=False) runs layers again in the
backward pass, when the collector is closed: they must do the same work then, so the padding mask is remembered until the next
collector opens, and the loss they make goes nowhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn


class AuxiliaryLosses:
    """Losses by adapter, one entry for each call of each layer."""

    def __init__(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = {}

    def add(self, adapter: str, loss: torch.Tensor) -> None:
        """Takes a scalar."""
        self.losses.setdefault(adapter, []).append(loss)

    def __bool__(self) -> bool:
        return len(self.losses) > 0  # which older compilers can follow

    def total(self) -> torch.Tensor | float:
        """For each adapter the mean over its layers, summed over adapters; 0.0 when there is none."""
        return sum((torch.stack(losses).mean() for losses in self.losses.values()), 0.0)


_collectors: list[AuxiliaryLosses] = []
_masks: list[torch.Tensor | None] = []  # at most one: of the collector that was opened last


@contextmanager
def auxiliary_losses(mask: torch.Tensor | None = None) -> Iterator[AuxiliaryLosses]:
    """Collects the auxiliary losses of all adapters that run inside.

    mask: (B, L), non-zero where a token is not padding; layers whose input is (B, L, width) leave padding out.
    """
    collected = AuxiliaryLosses()
    _collectors.append(collected)
    _masks[:] = [mask]
    try:
        yield collected
    finally:
        _collectors[:] = [one for one in _collectors if one is not collected]


def add_loss_to_output(model: nn.Module) -> None:
    """Adds auxiliary losses that nobody else collects to the loss in the model's output, so that stock trainers have them.

    By hooks on the model itself, since PeftModel, DDP and trainers call it in different ways.
    """
    if open_collector not in model._forward_pre_hooks.values():
        model._own_auxiliary = None  # type: ignore[assignment]
        model.register_forward_pre_hook(open_collector, with_kwargs=True)
        model.register_forward_hook(close_collector, always_call=True)


def open_collector(model: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    """Opens a collector for one forward pass of the model in training, unless one is open."""
    if model.training and current_collector() is None:
        context = auxiliary_losses(named.get("attention_mask"))
        model._own_auxiliary = context, context.__enter__()  # type: ignore[assignment]


def close_collector(model: nn.Module, inputs: Any, output: Any) -> None:
    """Closes it, and adds what it has to output.loss."""
    if model._own_auxiliary is None:
        return
    context, collected = model._own_auxiliary  # type: ignore[misc]
    model._own_auxiliary = None  # type: ignore[assignment]
    context.__exit__(None, None, None)
    if collected and getattr(output, "loss", None) is not None:
        output.loss = output.loss + collected.total()
    elif collected:
        warn_once()


def current_collector() -> AuxiliaryLosses | None:
    """The innermost open collector."""
    return _collectors[-1] if _collectors else None


def should_compute_loss() -> bool:
    """Whether layers in training shall compute their auxiliary loss: yes once anybody has collected one.

    Raises:
        ValueError: when a collector is open but gradients are off, as under gradient checkpointing of the old kind.
    """
    if _collectors and not torch.is_grad_enabled():
        raise ValueError(
            "The adapter's auxiliary loss is lost without gradients: use gradient checkpointing with use_reentrant=False, "
            "or put the model in eval mode."
        )
    if not _masks:
        warn_once()
    return bool(_masks)


def warn_once() -> None:
    """Says once that nobody collects; not from inside a compiled graph, which a warning would break."""
    if not torch.compiler.is_compiling():
        warn()


@cache
def warn() -> None:
    warnings.warn(
        "The adapter trains without its auxiliary loss. Wrap the forward pass in rankfold.auxiliary_losses() and add its "
        "total() to the loss; a PeftModel whose output has a loss does so by itself.",
        stacklevel=2,
    )


def token_weights(x: torch.Tensor) -> torch.Tensor:
    """Weights (...) of the tokens of x (..., width) that sum to 1: equal, or 0 for padding where the mask fits."""
    precise = torch.promote_types(x.dtype, torch.float32)
    mask = _masks[0] if _masks else None
    if mask is None or mask.shape != x.shape[:-1]:
        return torch.full(x.shape[:-1], 1 / x.shape[:-1].numel(), device=x.device, dtype=precise)
    weights = mask.to(x.device, precise)
    return weights / weights.sum().clamp(min=1)
