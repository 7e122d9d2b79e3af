"""`rankfold resume`: a run goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import parse_options, positional
from .outcome import print_outcome


def resume(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        run: Annotated[Path, positional()]
        """Run folder."""
        accept_changes: bool = False
        """Go on though images, captions, rows, adapters or the base are not those that the run was trained on so far."""

    options = parse_options(Options, argv, "resume")
    from ...training.config.instruct import ConversationConfig
    from ...training.config.yaml_file import from_yaml
    from ...training.launch.start import resume as go_on

    run = go_on(options.run, accept_changes=options.accept_changes)
    talks = isinstance(from_yaml(run.config_file), ConversationConfig)
    print_outcome(run.folder, f"rankfold chat --run {run.folder} --image PICTURE QUESTION" if talks else "")
