"""The optimizer of a run, by its name in torch, or one of the libraries' that torch lacks."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from ...toolkit.core import devices
from ...toolkit.core.errors import UserError, nearest
from ..config.base import LoopConfig

# name -> where it is; these libraries come with the extra `optimizers`.
OTHERS = {
    "AdamW8bit": "bitsandbytes.optim",
    "Lion8bit": "bitsandbytes.optim",
    "Prodigy": "prodigyopt",
    "AdamWScheduleFree": "schedulefree",
}


def make_optimizer(config: LoopConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer by its name, fused where torch has it.

    Raises:
        UserError: for a name that nobody knows, a library that is not installed or settings that the optimizer refuses.
    """
    check_optimizer(config)
    module = importlib.import_module(OTHERS.get(config.optimizer, "torch.optim"))
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if devices.is_fused(devices.here(), config.optimizer):
        settings["fused"] = True
    try:
        return getattr(module, config.optimizer)(groups, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {config.optimizer} refuses its settings: {error}.") from error


def check_optimizer(config: LoopConfig) -> None:
    """Raises UserError when there is no such optimizer or scheduler, its library is missing, or it does not work on this device."""
    from diffusers.optimization import SchedulerType

    known = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]
    if config.optimizer not in [*known, *OTHERS]:
        near = nearest(config.optimizer, [*known, *OTHERS])
        raise UserError(
            f"--optimizer {config.optimizer} is neither in torch.optim nor one of {', '.join(OTHERS)}.{near}"
        )
    library = OTHERS.get(config.optimizer, "torch").split(".")[0]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"--optimizer {config.optimizer} is in the library {library}, which is not installed: "
            'pip install "rankfold[optimizers]"'
        )
    devices.refuse(f"--optimizer {config.optimizer}", devices.optimizer_fault(devices.here(), config.optimizer))
    schedules = [kind.value for kind in SchedulerType]
    if config.lr_scheduler not in schedules:
        raise UserError(f"--lr-scheduler {config.lr_scheduler} is unknown.{nearest(config.lr_scheduler, schedules)}")
