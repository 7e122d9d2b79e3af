"""`rankfold search instruct`."""

from __future__ import annotations

from .options import check_out_free
from .outcome import print_outcome
from .train_instruct import parse_config


def search_instruct(argv: list[str]) -> None:
    config, overwrite = parse_config("search-instruct", argv, "search instruct")
    check_out_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    print_outcome(run.folder, f"rankfold train instruct --config {run.folder / 'best.yaml'}")
