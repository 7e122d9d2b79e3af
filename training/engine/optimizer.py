"""The optimizer of a run, by its name in torch, or one of the libraries' that torch lacks."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from ...toolkit.core import devices
from ...toolkit.core.errors import UserError, did_you_mean
from ..config.base import LoopConfig

# name -> where it is; these libraries come with the extra `optimizers`.
EXTRA_OPTIMIZERS = {
    "AdamW8bit": "bitsandbytes.optim",
    "Lion8bit": "bitsandbytes.optim",
    "Prodigy": "prodigyopt",
    "AdamWScheduleFree": "schedulefree",
    "CAME": "pytorch_optimizer",
    "Lion": "pytorch_optimizer",
}


def make_optimizer(config: LoopConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer by its name, fused where torch has it.

    Raises:
        UserError: for a name that nobody knows, a library that is not installed or settings that the optimizer refuses.
    """
    check_optimizer(config)
    module = importlib.import_module(EXTRA_OPTIMIZERS.get(config.optimizer, "torch.optim"))
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if devices.has_fused_kernel(devices.this_machine(), config.optimizer):
        settings["fused"] = True
    try:
        return getattr(module, config.optimizer)(groups, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {config.optimizer} refuses its settings: {error}.") from error


def check_optimizer(config: LoopConfig) -> None:
    """Raises UserError when there is no such optimizer or scheduler, its library is missing, or it does not work on this device."""
    from diffusers.optimization import SchedulerType

    known = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]
    if config.optimizer not in [*known, *EXTRA_OPTIMIZERS]:
        near = did_you_mean(config.optimizer, [*known, *EXTRA_OPTIMIZERS])
        raise UserError(
            f"--optimizer {config.optimizer} is neither in torch.optim nor one of {', '.join(EXTRA_OPTIMIZERS)}.{near}"
        )
    library = EXTRA_OPTIMIZERS.get(config.optimizer, "torch").split(".")[0]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"--optimizer {config.optimizer} is in the library {library}, which is not installed: "
            'pip install "rankfold[optimizers]"'
        )
    devices.raise_fault(
        f"--optimizer {config.optimizer}", devices.optimizer_fault(devices.this_machine(), config.optimizer)
    )
    schedules = [kind.value for kind in SchedulerType]
    if config.lr_scheduler not in schedules:
        raise UserError(
            f"--lr-scheduler {config.lr_scheduler} is unknown.{did_you_mean(config.lr_scheduler, schedules)}"
        )
    if config.lr_scheduler == SchedulerType.PIECEWISE_CONSTANT.value:
        raise UserError(
            f"--lr-scheduler {config.lr_scheduler} needs rules that cannot be given here: take constant, linear or cosine."
        )


def optimizer_notice(config: LoopConfig) -> str:
    """What is probably not meant about the optimizer's settings; '' for nothing."""
    if config.optimizer == "Prodigy" and config.learning_rate < 0.1:
        return f"--optimizer Prodigy finds its own rate and expects --learning-rate 1, not {config.learning_rate:g}: it will learn little."
    return ""
