"""The PEFT config that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig

from ...toolkit.adapters.registry import make_config
from .adapter import AdapterSettings


def peft_config(config: AdapterSettings, targets: Sequence[str]) -> PeftConfig:
    """The PEFT config that the run's settings ask for.

    Raises:
        UserError: for an adapter that does not exist or a setting that it refuses.
    """
    return make_config(
        config.adapter,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=tuple(targets),
        options=config.adapter_options,
        rank_pattern=getattr(config, "rank_pattern", None),
    )
