"""`rankfold train instruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...toolkit.core.errors import UserError
from ...toolkit.core.paths import assets_folder
from .options import check_out_free, parse_run, take_option
from .outcome import print_outcome


def train_instruct(argv: list[str]) -> None:
    """`--config FILE` gives the defaults; other options change them."""
    config, overwrite = parse_config("instruct", argv, "train instruct")
    check_out_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    print_outcome(run.folder, f"rankfold chat --run {run.folder} --image PICTURE QUESTION")


def parse_config(method: str, argv: list[str], name: str) -> tuple[Any, bool]:
    """The config that the options ask for, and --overwrite."""
    from ...training.config.yaml_file import METHODS, from_yaml

    config_class = METHODS[method]
    file, argv = take_option(argv, "--config")
    default = from_yaml(recipe_file(file)) if file else config_class()
    if not isinstance(default, config_class):
        raise UserError(f"--config {file} is of another method: use the command it was made for.")
    return parse_run(config_class, argv, name, default)


def recipe_file(name: str) -> Path:
    """A config file by its path, or one of those that ship with rankfold by its name."""
    shipped = assets_folder() / "recipes" / f"{name}.yaml"
    return shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
