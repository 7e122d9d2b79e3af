"""`rankfold demo edit`: the embedded model learns from pairs to follow a reference, offline, and shows that it does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from .options import OverwriteOption, parse_options
from .outcome import print_outcome


@dataclass(frozen=True, kw_only=True)
class DemoEditConfig(OverwriteOption):
    """Teaches the embedded model to draw what a reference shows, where the words do not say it."""

    out: Path = Path("runs/demo-edit")
    """Folder of pairs, run and images."""
    pairs: Annotated[int, Ge(8)] = 400
    """Pairs to learn from."""
    steps: Annotated[int, Ge(1)] = 300
    """Training steps."""
    test: Annotated[int, Ge(4)] = 48
    """References to measure with, half of them things and half creatures, none of which any training has seen."""
    adapter: str = "lora"
    """Adapter method."""
    threads: Annotated[int, Ge(1)] = 1
    """Torch threads."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of pairs, training and images."""


def demo_edit(argv: list[str]) -> None:
    config = parse_options(DemoEditConfig, argv, "demo edit")
    run_demo_edit(config)


def run_demo_edit(config: DemoEditConfig) -> dict[str, dict[str, Any]]:
    """Trains, measures and prints; returns the figures, none when the training was stopped.

    A demo that is in the folder is redone; anything else there is left alone, unless the config says to overwrite it.
    """
    import torch

    torch.set_num_threads(config.threads)
    from ...training.embedded.demo_edit import edit_config, is_edit_data, measure_edits, write_edit_data
    from ...training.launch.start import train

    start, data, run = time.time(), config.out / "data", Run(config.out / "run")
    overwrite = config.overwrite or is_edit_data(data)
    check_folder(data, run, overwrite=overwrite)
    if overwrite and not config.overwrite:
        print(f"{config.out} holds a demo already, which this one replaces.")
    rows = write_edit_data(data, seed=config.seed, rows=config.pairs, test=config.test)
    print(
        f"Teaching tiny-kontext to draw '{rows[0].prompt}' and the like from a reference, by {config.pairs} pairs ({data})"
    )
    own = {name: getattr(config, name) for name in ("steps", "adapter", "threads", "seed")}
    run = train(edit_config(data, run.folder, **own), overwrite=overwrite and run.is_run())
    if run.status()["state"] != "done":
        print_outcome(run.folder)
        return {}
    trained = time.time()
    figures = measure_edits(run, data, rows, seed=config.seed)
    print_figures(figures)
    print(f"\nimages, a row for each line of the table: {run.folder / 'edits.png'}")
    print(f"trained in {trained - start:.0f} s, everything in {time.time() - start:.0f} s")
    print(
        f'Next: rankfold sample --run {run.folder} --reference {data / "test" / "0001.png"} --prompt "{rows[1].prompt}"'
    )
    print("      rankfold train edit --base black-forest-labs/FLUX.2-klein-base-4B --images AFTER --references BEFORE")
    return figures


def check_folder(data: Path, run: Run, *, overwrite: bool) -> None:
    """Checks data and run of a demo that is to be made, before anything is written.

    Raises:
        UserError: for a run that is there and shall not be overwritten, and for data that no demo has written.
    """
    from ...training.config.subject import SubjectConfig
    from ...training.embedded.demo_edit import is_edit_data
    from ...training.runs.begin import check_out

    if data.exists() and any(data.iterdir()) and not is_edit_data(data):
        raise UserError(f"{data} holds files that no demo has written: give another --out.")
    check_out(SubjectConfig(out=run.folder), overwrite=overwrite and run.is_run())


def print_figures(figures: dict[str, dict[str, Any]]) -> None:
    """A line for each way that images were made, a column for each share with its interval."""

    def shown(name: str, own: dict[str, Any] | None) -> str:
        if own is None:
            return ""
        form = "{:.1f}" if name.endswith("dB") else "{:.0%}"
        return "{} ({} to {})".format(*(form.format(own[key]) for key in ("mean", "low", "high")))

    first = next(iter(figures.values()))
    print(f"\n{'':28} {' '.join(f'{name:21}' for name in first)}".rstrip())
    for name, own in figures.items():
        print(f"{name:28} {' '.join(f'{shown(column, own.get(column)):21}' for column in first)}".rstrip())
