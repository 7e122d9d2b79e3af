"""The optimizer of a run, by its name in torch."""

from __future__ import annotations

from typing import Any

import torch

from ..toolkit.errors import UserError, nearest
from .config import LoopConfig


def make_optimizer(config: LoopConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer by its name in torch.optim; fused where torch has it.

    Raises:
        UserError: for a name that torch.optim does not have or settings that the optimizer refuses.
    """
    check_optimizer(config)
    kind = getattr(torch.optim, config.optimizer)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer in ("AdamW", "Adam", "SGD", "Adagrad"):
        settings["fused"] = True
    try:
        return kind(groups, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {config.optimizer} refuses its settings: {error}.") from error


def check_optimizer(config: LoopConfig) -> None:
    """Raises UserError when torch.optim has no such optimizer or diffusers no such scheduler."""
    from diffusers.optimization import SchedulerType

    known = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]
    if config.optimizer not in known:
        raise UserError(f"--optimizer {config.optimizer} is not in torch.optim.{nearest(config.optimizer, known)}")
    schedules = [kind.value for kind in SchedulerType]
    if config.lr_scheduler not in schedules:
        raise UserError(f"--lr-scheduler {config.lr_scheduler} is unknown.{nearest(config.lr_scheduler, schedules)}")
