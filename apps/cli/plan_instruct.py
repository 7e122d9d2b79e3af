"""`rankfold plan instruct`: what a run will take, nothing loaded."""

from __future__ import annotations

from .train_instruct import parse_config


def plan_instruct(argv: list[str]) -> None:
    """Reads and checks the data as `train instruct` does; no weight is loaded, nothing is written."""
    config, _ = parse_config("instruct", argv, "plan instruct")
    from ...training.launch.notices import data_notices
    from ...training.launch.plan_instruct import plan_instruct as plan

    found = plan(config)
    print(*data_notices(found.config, found.data), *found.summary(), sep="\n")
