"""`rankfold convert-config`: a configuration of another trainer becomes one of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...toolkit.core.errors import UserError
from .options import parse_options, positional


def convert_config(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        file: Annotated[Path, positional()]
        """Configuration of kohya's sd-scripts (.toml), ai-toolkit (.yaml), OneTrainer or SimpleTuner (.json)."""
        out: Path | None = None
        """File for ours; unset prints it."""

    options = parse_options(Options, argv, "convert-config")
    from ...toolkit.core.files import write_text
    from ...training.config.convert import convert_config as convert

    converted = convert(options.file)
    if options.out is not None and options.out.exists():
        raise UserError(f"--out {options.out} is there already: choose another name.")
    if options.out is None:
        print(converted.yaml(), end="")
    else:
        write_text(options.out, converted.yaml())
        print(
            f"{options.out}: {len(converted.values)} settings of {converted.tool}. Next: rankfold train subject --config {options.out}"
        )
    for text in converted.left_out:
        print(f"# not carried over: {text}")
