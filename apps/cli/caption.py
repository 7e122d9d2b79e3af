"""`rankfold caption`: captions beside a subject's photos, by any local vision-language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...toolkit.core.errors import UserError
from .options import parse_options, positional


@dataclass(frozen=True)
class CaptionOptions:
    images: Annotated[Path, positional()]
    """Folder of images. Those that have a caption keep it."""
    base: str = "tiny-vlm"
    """Vision-language model that says what is to be seen: a folder, a hub id, or tiny-vlm, which knows drawn images only."""
    token: str = "sks"
    """Rare word that calls the subject."""
    class_noun: str | None = None
    """What the subject is; unset means creature with tiny-vlm, which knows nothing else, and has to be given with others."""
    question: str = ""
    """What the model is asked; unset means 'Describe the picture.'"""
    overwrite: bool = False
    """Replace existing captions."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of the model."""
    device: str = ""
    """Where to run: cuda, xpu, mps or cpu; unset means the GPU if there is one."""


def caption(argv: list[str]) -> None:
    options = parse_options(CaptionOptions, argv, "caption")
    from ...pipelines.caption import generate_captions
    from ...pipelines.chat import open_chat
    from ...toolkit.core.devices import parse_device
    from ...toolkit.core.files import write_text
    from ...toolkit.data.subjects import find_samples
    from ...toolkit.embedded.questions import DESCRIBE
    from ...toolkit.vlm.model import EMBEDDED
    from ...training.config.defaults import EMBEDDED_SETTINGS

    noun = (
        EMBEDDED_SETTINGS["class_noun"]
        if options.class_noun is None and options.base in EMBEDDED
        else options.class_noun
    )
    if noun is None:
        raise UserError("--class-noun is missing: say what the subject is (dog, person, mug ...), captions name it.")
    for flag, word in (("--token", options.token), ("--class-noun", noun)):
        if not word.strip():
            raise UserError(f"{flag} is empty: give the word that captions should have.")
    samples = find_samples(options.images)
    missing = [sample.path for sample in samples if options.overwrite or not sample.caption]
    if not missing:
        print(f"All {len(samples)} images have captions; --overwrite replaces them.")
        return
    vision = open_chat(options.base, precision=options.precision, device=parse_device(options.device))
    made = generate_captions(vision, missing, options.token, noun, question=options.question or DESCRIBE)
    for path, text in zip(missing, made, strict=True):
        write_text(path.with_suffix(".txt"), text + "\n")
        print(f"{path.name}: {text}", flush=True)
    print(f"{len(missing)} captions written; read them before you train, models see what is not there.")
