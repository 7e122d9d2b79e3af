"""Images by the model in training, as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ...pipelines.generate import denoise, max_batch_size
from ...toolkit.diffusion.model import DiffusionModel
from ..config.images import DiffusionConfig
from ..engine.processes import map_distributed
from .prompts import Prompts
from .sizes import square_size


def draw_images(
    model: DiffusionModel, prompts: Prompts, config: DiffusionConfig, texts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """One image per text and seed, drawn in shares of whole batches by all processes; the texts are among the prompts."""
    embeds = prompts.embeds_of(torch.tensor([prompts.numbers[text] for text in [*texts, ""]]))
    side, _ = square_size(config, model)
    pipe, count = model.pipeline(model.denoiser_name, "vae"), max_batch_size(side)

    def draw_batch(start: int) -> list[Image.Image]:
        some = slice(start, min(start + count, len(texts)))
        own = seeds[some]
        return denoise(
            pipe,
            {name: value[some] for name, value in embeds.items()},
            negative={name: value[-1:].expand(len(own), *value.shape[1:]) for name, value in embeds.items()},
            seeds=own,
            steps=config.preview_steps,
            guidance_scale=config.guidance_scale,
            width=side,
        )

    return [image for images in map_distributed(range(0, len(texts), count), draw_batch) for image in images]
