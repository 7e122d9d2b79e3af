"""`rankfold search instruct`."""

from __future__ import annotations

from .options import check_free
from .outcome import report
from .train_instruct import configured


def search_instruct(words: list[str]) -> None:
    config, overwrite = configured("search-instruct", words, "search instruct")
    check_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    report(run.folder, f"rankfold train instruct --config {run.folder / 'best.yaml'}")
