"""How fast a training is on this machine, by runs that were alike."""

from __future__ import annotations

from typing import Any

from ....toolkit.core.errors import UserError
from ....training.config.base import LoopConfig
from ....training.config.yaml_file import from_yaml
from ....training.launch.queue import list_runs
from .paths import StudioPaths

ALIKE = (
    "base", "adapter", "rank", "batch_size", "gradient_accumulation", "resolution", "precision", "quantize",
    "gradient_checkpointing", "train_text_encoder", "target_modules", "optimizer", "preservation_weight", "prior_weight",
)  # fmt: skip
ROWS = 3  # of metrics that a speed is taken from


def measured_step(paths: StudioPaths, config: LoopConfig) -> tuple[float, str] | None:
    """Seconds of a step, and the newest run that took them with the same settings; None where there is none.

    config: with its defaults resolved.
    """
    for run in list_runs(paths.runs):
        try:
            own = from_yaml(run.config_file)
        except UserError:
            continue
        if type(own) is not type(config) or any(getattr(own, n, None) != getattr(config, n, None) for n in ALIKE):
            continue
        if seconds := step_seconds(run.metrics(), own):
            return seconds, run.folder.name
    return None


def step_seconds(rows: list[dict[str, Any]], config: LoopConfig) -> float:
    """Seconds of a step by the last lines of a run's metrics; 0 where they do not say."""
    speeds = sorted([row["samples_per_second"] for row in rows if row.get("samples_per_second", 0) > 0][-ROWS:])
    return config.batch_size * config.gradient_accumulation / speeds[len(speeds) // 2] if speeds else 0.0
