"""`rankfold train dedistill`: a training adapter for a distilled base, made of the base's own images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from .options import check_out_free, parse_run
from .outcome import print_outcome


def train_dedistill(argv: list[str]) -> None:
    """The base draws images in its own few steps, and a LoRA is trained on them; the run is what --training-adapter takes."""
    from ...training.config.subject import SubjectConfig

    @dataclass(frozen=True, kw_only=True)
    class Options(SubjectConfig):
        prompts: Path | None = None
        """File with a prompt a line, of all kinds of images that the base draws well; unset: captions of the embedded world."""
        number: Annotated[int, Ge(1)] = 200
        """Images that the base draws, into --images, or beside the run; the prompts are taken in turn."""

    own = SubjectConfig(adapter="lora", class_noun="image", preservation_weight=0.0, preview_every=0)
    options, overwrite = parse_run(Options, argv, "train dedistill", Options(**asdict(own)))
    config = SubjectConfig(**{field.name: getattr(options, field.name) for field in fields(SubjectConfig)})
    check_out_free(config, overwrite=overwrite)
    from ...training.launch.dedistill import dedistill

    run = dedistill(config, options.prompts, options.number, overwrite=overwrite)
    print_outcome(run.folder, f"rankfold train subject --base {config.base} --training-adapter {run.folder} ...")
