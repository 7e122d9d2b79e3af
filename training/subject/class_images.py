"""Images by the base model itself: of the class, for prior preservation, made once and kept for later runs; or of any texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from ...pipelines.generate import denoise, max_batch_size
from ...toolkit.core.cache import FORMAT, cache_key
from ...toolkit.core.files import write_png
from ...toolkit.core.paths import cache_folder
from ...toolkit.data.images import READ_ERRORS, open_image
from ...toolkit.data.subjects import Sample, find_samples
from ...toolkit.diffusion.model import DiffusionModel
from ..config.images import DiffusionConfig
from .sizes import square_size

DRAWN = ".drawn.json"  # beside images that a base has drawn to be trained on itself: what decides them


def is_whole(path: Path, side: int) -> bool:
    """Whether an image is there as it was written: every chunk of a PNG carries a checksum."""
    try:
        with open_image(path) as image:
            image.verify()
            return image.format == "PNG" and image.size == (side, side)
    except READ_ERRORS:
        return False


def class_samples(model: DiffusionModel, config: DiffusionConfig, accelerator: Accelerator) -> list[Sample]:
    """Images of the class: the user's own, or the base's, of which each process makes its share. model: without any adapter."""
    if config.prior_folder is not None:
        return find_samples(config.prior_folder, skip_bad=config.skip_bad, option="--prior-folder")
    side, _ = square_size(config, model)
    key = cache_key(
        kind="class",
        format=FORMAT,
        family=type(model).__name__,
        base=model.fingerprint(*model.parts),
        dtype=config.precision,
        quantize=config.quantize,
        prompt=config.class_prompt,
        side=side,
        steps=config.preview_steps,
        guidance=config.guidance_scale,
    )
    paths = draw_missing(
        model, config, [config.class_prompt] * config.prior_images, cache_folder() / "class" / key, accelerator
    )
    return [Sample(path) for path in paths]


def draw_missing(
    model: DiffusionModel, config: DiffusionConfig, texts: Sequence[str], folder: Path, accelerator: Accelerator
) -> list[Path]:
    """An image by the base for each text, with its number as name and seed; those that are there whole stay. Each process makes its share.

    model: without any adapter.
    """
    side, _ = square_size(config, model)
    paths = [folder / f"{number:05d}.png" for number in range(len(texts))]
    own = range(accelerator.process_index, len(paths), accelerator.num_processes)
    missing = [number for number in own if not is_whole(paths[number], side)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
        for start in range(0, len(missing), max_batch_size(side)):
            chunk = missing[start : start + max_batch_size(side)]
            images = denoise(
                pipe,
                [texts[number] for number in chunk],
                seeds=chunk,
                steps=config.preview_steps,
                guidance_scale=config.guidance_scale,
                width=side,
            )
            for number, image in zip(chunk, images, strict=True):
                write_png(paths[number], image)
    accelerator.wait_for_everyone()
    return paths
