"""`rankfold plan subject`: what a run will take, nothing loaded."""

from __future__ import annotations

from .train_subject import subject_options


def plan_subject(argv: list[str]) -> None:
    """Nothing is loaded, nothing written."""
    config, fit, folds, overwrite = subject_options(argv, "plan subject")
    from ...training.config.defaults import describe_settings
    from ...training.launch.plan import advice, disk_bytes, fit_to_memory, min_seconds, plan

    estimate = plan(config)
    config = estimate.config
    if fit is None:
        lines = advice(estimate)
    else:
        flags, estimate = fit_to_memory(estimate, fit)
        lines = [f"fits in {fit:g} GiB with: {' '.join(flags)}" if flags else f"fits in {fit:g} GiB as it is"]
    print(f"settings         {describe_settings(estimate.config)}")
    for part in ("base", "adapter", "working", "peak"):
        print(f"{part:16} {getattr(estimate, part) / 2**30:8.2f} GiB")
    if estimate.swapped:
        waiting = sum(estimate.swapped) / 2**30
        print(f"main memory      {waiting:8.2f} GiB for the {len(estimate.swapped)} blocks that are swapped")
    print(f"trainable params {estimate.parameters:,}; the adapter's file: {estimate.parameters * 4 / 2**20:.1f} MiB")
    print(f"disk             {disk_bytes(estimate) / 2**20:8.1f} MiB in the run folder, beside previews")
    print(
        f"time             {min_seconds(estimate) / 60:8.1f} minutes at least: {config.steps} steps of "
        f"{estimate.flops / 1e9:,.1f} GFLOP at the rate of large matrix products here"
    )
    print(*lines, sep="\n")
    if folds:
        print(f"That is one training; --folds makes {folds} more.")
    if overwrite:
        print("--overwrite is for the training: a plan writes nothing.")
