"""How commands read their options."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

from ..toolkit.paths import at_home
from .commands import COMMANDS
from .terminal import calm


def parse(kind: Any, words: list[str], name: str, default: Any = None) -> Any:
    """Reads the options of a dataclass from the command line; ~ in a path is put out, as a shell does where it sees it."""
    import tyro

    extra = {} if default is None else {"default": default}
    read = tyro.cli(kind, args=words, prog=f"rankfold {name}", description=COMMANDS[name].help, **extra)
    return replace(read, **{field.name: at_home(getattr(read, field.name)) for field in fields(read)})


def take_option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option and the words without it."""
    for number, word in enumerate(words):
        if word == name and number + 1 < len(words):
            return words[number + 1], words[:number] + words[number + 2 :]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1], words[:number] + words[number + 1 :]
    return None, words


def positional() -> Any:
    """tyro's mark for an argument without a flag."""
    import tyro

    return tyro.conf.Positional


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of the libraries out of our output."""
    calm(os.environ)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
