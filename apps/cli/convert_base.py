"""`rankfold convert-base`: a checkpoint in one file, or in several, becomes a pipeline folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...toolkit.core.errors import UserError
from .options import parse_options, positional


def convert_base(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options:
        file: Annotated[Path, positional()]
        """Checkpoint: .safetensors or .ckpt."""
        out: Path
        """Folder for the pipeline."""
        layout: str | None = None
        """Pipeline folder or hub id with the configs, tokenizers and missing parts; unset means the one usual for such a file."""
        vae: Path | None = None
        """File with the autoencoder, where the checkpoint is the denoiser alone."""
        text_encoder: tuple[Path, ...] = ()
        """Files with the text encoders, likewise."""

    options = parse_options(Options, argv, "convert-base")
    for file in (options.file, *([options.vae] if options.vae else []), *options.text_encoder):
        if not file.is_file():
            raise UserError(f"{file} is not a file.")
    from ...toolkit.diffusion.single_file import convert

    print(convert(options.file, options.layout, options.out, options.vae, options.text_encoder))
