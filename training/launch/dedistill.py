"""A training adapter for a distilled base, made of the base's own images.

The base draws them as it draws best, in its few steps. A LoRA that is trained on them by the plain loss brings no new subject or style;
what it does learn is to denoise at every level towards images that the base makes anyway, which is what a distillation takes away. In
the weights while something else is trained (`--training-adapter`), it keeps that from being learned along.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.records import read_record
from ...toolkit.core.run_folder import Run
from ...toolkit.core.texts import read_lines
from ...toolkit.diffusion.load import EMBEDDED, open_model
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.embedded import world
from ..config.checks import check_ranges
from ..config.defaults import resolve_defaults
from ..config.subject import SubjectConfig
from ..engine.processes import make_accelerator
from ..runs.begin import check_out
from ..subject.class_images import DRAWN, draw_missing
from .start import check_base, check_settings, train


def dedistill(config: SubjectConfig, prompts: Path | None, number: int, *, overwrite: bool = False) -> Run:
    """Draws images by the base and trains a LoRA on them; the run is what `--training-adapter` takes.

    config: its images are where they are drawn to, by default beside the run; preview_steps and guidance_scale are how. prompts: a file
    with one a line, taken in turn until there are `number` images. overwrite: as `train` has it.

    Raises:
        UserError: where it is not said how the base draws, or what; for a folder that holds other images; and as `train` does.
    """
    check_out(config, overwrite=overwrite)
    check_how(config, prompts)
    texts = read_texts(prompts, number, config.seed)
    config = replace(config, images=config.images or config.out.with_name(f"{config.out.name}-images"))
    draw_own_images(config, texts)
    return train(config, overwrite=overwrite)


def check_how(config: SubjectConfig, prompts: Path | None) -> None:
    """Raises UserError where it is not said how the base draws, or what; and for settings that make no training adapter."""
    if config.adapter != "lora":
        raise UserError(f"--adapter {config.adapter}: a training adapter is plain LoRA; leave it out.")
    if config.preview_base:
        raise UserError("--preview-base: a training adapter is made of what the base itself draws; leave it out.")
    if config.base in EMBEDDED:
        return
    for flag, given in (("--preview-steps", config.preview_steps), ("--guidance-scale", config.guidance_scale)):
        if given is None:
            raise UserError(
                f"{flag} is missing: say how this base draws, as its card does, such as --preview-steps 8 --guidance-scale 1."
            )
    if prompts is None:
        raise UserError(
            "--prompts is missing: give a file with a prompt a line, of all kinds of images that the base draws well."
        )


def read_texts(prompts: Path | None, number: int, seed: int) -> list[str]:
    """What is drawn: the file's prompts in turn, or captions of the embedded world.

    Raises:
        UserError: for a file that is not there, or empty.
    """
    if prompts is None:
        return world.random_captions(number, np.random.default_rng((seed, 73)))
    try:
        lines = [line.strip() for line in read_lines(prompts) if line.strip()]
    except OSError as error:
        raise UserError(f"--prompts {prompts} cannot be read ({error.strerror}).") from error
    if not lines:
        raise UserError(f"--prompts {prompts} is empty: write a prompt a line.")
    return [lines[at % len(lines)] for at in range(number)]


def draw_own_images(config: SubjectConfig, texts: list[str]) -> None:
    """Draws an image for each text into config.images, with its caption beside it. What has been drawn alike before is kept.

    Raises:
        UserError: for a folder that holds other images, and settings that cannot work.
    """
    check_ranges(config)
    config = resolve_defaults(config)
    check_settings(config)
    base = check_base(config)
    assert config.images is not None
    accelerator = make_accelerator(config)
    model = open_model(base, DTYPES[config.precision], accelerator.device, config.quantize)
    facts = {
        "base": config.base,
        "denoiser": model.fingerprint(model.denoiser_name),
        "resolution": config.resolution or model.native_resolution,
        "steps": config.preview_steps,
        "guidance_scale": config.guidance_scale,
        "precision": config.precision,
        "quantize": config.quantize,
        "prompts": texts,
    }
    if accelerator.is_main_process:
        claim_folder(config.images, facts)
        for number, text in enumerate(texts):
            write_text(config.images / f"{number:05d}.txt", text)
    accelerator.wait_for_everyone()
    print(f"{len(texts)} images by {config.base}, {config.preview_steps} steps each, in {config.images}", flush=True)
    draw_missing(model, config, texts, config.images, accelerator)


def claim_folder(folder: Path, facts: dict[str, object]) -> None:
    """Makes the folder one of images that are decided by these facts.

    Raises:
        UserError: when it holds anything else.
    """
    try:
        there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"--images {folder} is no folder that images can be drawn into ({error.strerror}).") from error
    if there and read_record(folder / DRAWN) != facts:
        raise UserError(
            f"--images {folder} holds {there[0]}, and what is drawn now would be other images: give another folder, or delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DRAWN, json.dumps(facts, indent=1))
