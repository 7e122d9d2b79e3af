"""What makes a run smaller: the rungs of --fit, and the cure for a run that ran out of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...toolkit.core.devices import check_precision, device_type, has_own_memory
from ...toolkit.core.errors import UserError
from ...toolkit.core.quantize import check_quantize
from ...toolkit.core.setting_names import as_flag
from ..config.base import LoopConfig
from ..config.subject import SubjectConfig
from ..engine.block_swap import check_block_swap
from ..engine.optimizer import check_optimizer
from ..engine.processes import num_processes
from ..subject.denoising import check_compile

SettingChange = dict[str, Any]

SUFFICIENT_VALUES = {
    "precision": ("bf16", "fp16"),
    "quantize": ("nf4",),
}  # values of a field that need no rung of its own any more


def savings(config: LoopConfig) -> list[tuple[str, SettingChange]]:
    """What can be done on this machine, from what costs least (in quality, then in time) to what costs most.

    Flags, and the settings that they are. A step sees as many images as before.
    """
    rows = config.batch_size * config.gradient_accumulation
    changes: list[SettingChange] = [
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"optimizer": "AdamW8bit"},
        {"batch_size": num_processes(), "gradient_accumulation": rows // num_processes()},
        {"blocks_to_swap": "all"},
        {"quantize": "int8"},
        {"quantize": "nf4"},
    ]
    return [
        (to_flags(change), change)
        for change in changes
        if not has_saving(config, change) and is_available(config, change)
    ]


def has_saving(config: LoopConfig, change: SettingChange) -> bool:
    """Whether a config has a saving, or a larger one of its kind."""
    return all(
        getattr(config, name, None) in (value, *SUFFICIENT_VALUES.get(name, ())) for name, value in change.items()
    )


def is_available(config: LoopConfig, change: SettingChange) -> bool:
    """Whether a saving can be carried out here."""
    if not change.keys() <= vars(config).keys() or ("blocks_to_swap" in change and not has_own_memory(device_type())):
        return False
    changed = replace(config, **change)
    try:
        check_optimizer(changed)
        check_quantize(changed.quantize)
        if "precision" in change:
            check_precision(changed.precision)
        if isinstance(changed, SubjectConfig):
            check_compile(changed)
            if changed.blocks_to_swap:
                check_block_swap(changed)
    except UserError:
        return False
    return True


def to_flags(change: SettingChange) -> str:
    """Settings as options of the command line."""
    words = {as_flag(name): value for name, value in change.items()}
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in words.items())
