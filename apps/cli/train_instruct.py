"""`rankfold train instruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...toolkit.core.errors import UserError
from ...toolkit.core.paths import assets
from .options import check_free, parse_run, take_option
from .outcome import report


def train_instruct(words: list[str]) -> None:
    """`--config FILE` gives the defaults; other options change them."""
    config, overwrite = configured("instruct", words, "train instruct")
    check_free(config, overwrite=overwrite)
    from ...training.launch.start import train

    run = train(config, overwrite=overwrite)
    report(run.folder, f"rankfold chat --run {run.folder} --image PICTURE QUESTION")


def configured(method: str, words: list[str], name: str) -> tuple[Any, bool]:
    """The config that the options ask for, and --overwrite."""
    from ...training.config.yaml_file import METHODS, from_yaml

    config_class = METHODS[method]
    file, words = take_option(words, "--config")
    default = from_yaml(recipe_file(file)) if file else config_class()
    if not isinstance(default, config_class):
        raise UserError(f"--config {file} is of another method: use the command it was made for.")
    return parse_run(config_class, words, name, default)


def recipe_file(name: str) -> Path:
    """A config file by its path, or one of those that ship with rankfold by its name."""
    shipped = assets() / "recipes" / f"{name}.yaml"
    return shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
