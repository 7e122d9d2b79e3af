"""`rankfold search subject`."""

from __future__ import annotations

from pathlib import Path

from ...toolkit.core.errors import UserError
from .options import check_out_free, parse_run, take_option
from .outcome import print_outcome


def search_subject(argv: list[str]) -> None:
    from ...training.config.search import SearchConfig
    from ...training.config.yaml_file import from_yaml, method_name

    config_file, argv = take_option(argv, "--config")
    default = from_yaml(Path(config_file)) if config_file else SearchConfig()
    if not isinstance(default, SearchConfig):
        raise UserError(
            f"--config {config_file} is of another method ({method_name(default)}): use the command it was made for."
        )
    config, overwrite = parse_run(SearchConfig, argv, "search subject", default)
    check_out_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    print_outcome(run.folder)
    table = run.folder / "structure.txt"
    if run.status()["state"] == "done":
        print(f"The structure: {table}; all that were tried: {run.folder / 'pareto.png'}")
        print(f"Train it from the start: rankfold train subject --config {run.folder / 'best.yaml'}")
