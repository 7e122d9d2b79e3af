"""Images by the model in training, as it is."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...pipelines.generate import denoise, max_batch_size
from ...toolkit.data.subjects import Sample, load_image, whole_references
from ...toolkit.diffusion.model import DiffusionModel
from ..config.images import DiffusionConfig
from ..engine.processes import map_distributed
from .prompts import Prompts
from .sizes import Size, reference_size, square_size, trained_sizes


def draw_images(
    model: DiffusionModel,
    prompts: Prompts,
    config: DiffusionConfig,
    texts: Sequence[str],
    seeds: Sequence[int],
    pairs: Sequence[Sample] = (),
) -> list[Image.Image]:
    """One image per text and seed, drawn in shares of whole batches by all processes; the texts are among the prompts.

    pairs: a sample for each text, of whose size and from whose references its image is made; then each is drawn alone.
    """
    wanted = prompts.embeds_of(prompts.numbers_of(texts, pairs))
    unwanted = prompts.embeds_of(prompts.numbers_of([""] * len(texts), pairs))
    side, _ = square_size(config, model)
    pipe, count = model.pipeline(model.denoiser_name, "vae"), 1 if pairs else max_batch_size(side)

    def draw_batch(start: int) -> list[Image.Image]:
        some = slice(start, min(start + count, len(texts)))
        own = seeds[some]
        width, height = trained_sizes(config, pairs[start], model)[0] if pairs else (side, side)
        return denoise(
            pipe,
            {name: value[some] for name, value in wanted.items()},
            negative={name: value[some] for name, value in unwanted.items()},
            seeds=own,
            steps=config.preview_steps,
            guidance_scale=config.guidance_scale,
            width=width,
            height=height,
            references=load_references(config, pairs[start], (width, height), model) if pairs else (),
        )

    return [image for images in map_distributed(range(0, len(texts), count), draw_batch) for image in images]


def load_references(config: DiffusionConfig, sample: Sample, size: Size, model: DiffusionModel) -> list[Image.Image]:
    """The references of a sample as the stock pipeline is to be given them, so that it sees what training does. size: the sample's."""
    if sample.references and model.own_reference_size(size):
        return whole_references(sample)
    return [
        load_image(Sample(path, flip=sample.flip), reference_size(config, path, size, model), config.crop)
        for path in sample.references
    ]


def load_pairs(
    config: DiffusionConfig, pairs: Sequence[Sample], model: DiffusionModel
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The images of samples as training sees them, and the first reference of each."""
    sizes = [trained_sizes(config, sample, model)[0] for sample in pairs]
    targets = [load_image(sample, size, config.crop) for sample, size in zip(pairs, sizes, strict=True)]
    first = [load_references(config, sample, size, model)[0] for sample, size in zip(pairs, sizes, strict=True)]
    return targets, first
