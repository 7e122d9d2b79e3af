"""`rankfold convert`: an adapter file of any tool in the format of another, proven."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from .options import BaseFileOptions, allowed_error, parse_options, positional


def convert(argv: list[str]) -> None:
    @dataclass(frozen=True)
    class Options(BaseFileOptions):
        file: Annotated[Path, positional()]
        """A LoRA file of any origin, an adapter folder or a run."""
        to: str
        """comfy, kohya, diffusers, peft, lycoris or comfy-lycoris (each method's own factors) or kohya-full (whole weight changes)."""
        out: Path | None = None
        """Folder for the result, or the file (.safetensors); unset means beside the file."""
        base: str = ""
        """Base model that it was made for; unset means the one that the file names."""
        prompt: str = ""
        """What the images of the proof show."""
        width: Annotated[int, Ge(0), Le(16384)] = 0
        """Width of the images of the proof in pixels; 0 means the base's own."""
        approximate: bool = False
        """Convert to the nearest plain LoRA when there is no exact one; its errors are measured and kept in the file."""
        max_error: Annotated[float, Ge(0)] | None = None
        """With --approximate: relative error of a layer's weight change, 0 to 1; unset means 0.05."""
        ignore_unused: bool = False
        """Convert a file although it holds tensors that the base has no place for; they are named and left out."""

    options = parse_options(Options, argv, "convert")
    from ...pipelines.convert import convert as convert_adapter
    from ...pipelines.proof import print_proof

    print_proof(
        convert_adapter(
            options.file,
            options.to,
            options.out,
            base=options.base,
            prompt=options.prompt,
            max_error=allowed_error(options.max_error, approximate=options.approximate),
            width=options.width,
            ignore_unused=options.ignore_unused,
        )
    )
