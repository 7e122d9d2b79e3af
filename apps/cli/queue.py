"""`rankfold queue`: a run put into the queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import parse_options, positional


def queue(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        config: Annotated[Path, positional()]
        """Config file (YAML), as every run folder holds one."""
        out: Path | None = None
        """Run folder; unset means the config's."""
        overwrite: bool = False
        """Delete the run that the folder holds."""

    from dataclasses import replace

    options = parse_options(Options, argv, "queue")
    from ...training.config.yaml_file import from_yaml
    from ...training.launch.queue import enqueue

    config = from_yaml(options.config)
    run = enqueue(replace(config, out=options.out or config.out), overwrite=options.overwrite)
    print(f"{run.folder} waits. Carry it out with: rankfold work --runs {run.folder.parent}")
