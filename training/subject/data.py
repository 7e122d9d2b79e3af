"""The images of a training as latents, from the cache where they are, with their captions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torchvision.transforms.functional import pil_to_tensor

from ...toolkit.core.cache import cache_key, file_hash, load_or_compute
from ...toolkit.core.paths import cache_folder
from ...toolkit.data.subjects import STRETCH, Sample, load_image, load_mask
from ...toolkit.diffusion.model import DiffusionModel
from ..config.images import DiffusionConfig
from ..engine.processes import share_work
from .class_images import class_samples
from .prompts import Prompts, without_token
from .rows import Rows, shuffle_tags
from .sizes import Size, reference_size, square_size, trained_sizes


@dataclass(frozen=True)
class ImageData:
    """Images by the size they are brought to."""

    instance: list[Rows]
    """Images of the subject."""
    prior: list[Rows] | None
    """Images of the class, with prior preservation."""
    held_out: list[Rows] | None
    """Images that are judged on and not trained on, all of one size."""


def encode_images(
    model: DiffusionModel,
    prompts: Prompts,
    config: DiffusionConfig,
    accelerator: Accelerator,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] = (),
) -> ImageData:
    """All images of a training. Their captions are added to `prompts`. model: without any adapter."""
    encoder = ImageEncoder(model, prompts, config, accelerator)
    prior = class_samples(model, config, accelerator) if config.prior_weight else []
    return ImageData(
        instance=encoder.build_rows(samples, config.prompt, subject=True),
        prior=encoder.build_rows(prior, config.class_prompt) if prior else None,
        held_out=encoder.build_rows(held_out, config.prompt) if held_out else None,
    )


class ImageEncoder:
    """Samples -> rows."""

    def __init__(
        self, model: DiffusionModel, prompts: Prompts, config: DiffusionConfig, accelerator: Accelerator
    ) -> None:
        self.model, self.prompts, self.config, self.accelerator = model, prompts, config, accelerator

    def build_rows(self, samples: Sequence[Sample], default_prompt: str, *, subject: bool = False) -> list[Rows]:
        """The samples by the sizes they are brought to. subject: these are trained on, with masks, shapes and resolutions of their own."""
        buckets: dict[tuple[Size, ...], list[Sample]] = {}
        for sample in samples:
            own = trained_sizes(self.config, sample, self.model) if subject else [square_size(self.config, self.model)]
            for size in own:
                others = (reference_size(self.config, path, size, self.model) for path in sample.references)
                buckets.setdefault((size, *others), []).append(sample)
        return [self.build_bucket(own, sizes, default_prompt, subject) for sizes, own in buckets.items()]

    def build_bucket(self, samples: list[Sample], sizes: Sequence[Size], default_prompt: str, subject: bool) -> Rows:
        """Samples of one size: latents, masks, and their prompts' numbers. sizes: theirs, then those of their references."""
        config, device, size = self.config, self.accelerator.device, sizes[0]
        latents = self.encode_latents(samples, size, config.crop)
        captions = [sample.caption or default_prompt for sample in samples]
        ways = [shuffle_tags(caption, config.caption_orders, config.seed) for caption in captions]
        most = max(len(own) for own in ways)
        ways = [(own * most)[:most] for own in ways]
        bare = [without_token(caption, config) for caption in captions]
        mean = torch.stack([row["mean"] for row in latents])
        draws = [row for row, sample in enumerate(samples) for _ in range(sample.repeats)]
        return Rows(
            mean=mean.to(device),
            std=torch.stack([row["std"] for row in latents]).to(device),
            prompts=torch.stack([self.prompts.add(own, sample) for own, sample in zip(ways, samples, strict=True)]),
            without_token=self.add_each(bare, samples) if subject and config.preservation_weight else None,
            class_prompt=None if subject else self.add_each([config.class_prompt] * len(samples), samples),
            empty=self.add_each([""] * len(samples), samples) if config.caption_dropout else None,
            mask=self.latent_mask_weights(samples, size, mean.shape[2:]) if subject and config.masks else None,
            references=[
                self.encode_references(samples, number, own).to(device) for number, own in enumerate(sizes[1:])
            ],
            draws=draws if len(draws) > len(samples) else (),
        )

    def add_each(self, texts: Sequence[str], samples: Sequence[Sample]) -> torch.Tensor:
        """The numbers (N,) of a prompt for each sample."""
        return torch.cat([self.prompts.add([text], sample) for text, sample in zip(texts, samples, strict=True)])

    def encode_latents(self, samples: list[Sample], size: Size, crop: str) -> list[dict[str, torch.Tensor]]:
        """Mean and std (C, H, W) of each sample's latents; each process makes its share of those that are missing."""
        model, cache = self.model, cache_folder() / "latents"
        vae, makers = model.fingerprint("vae"), []
        for sample in samples:
            key = cache_key(
                kind="latents",
                family=type(model).__name__,
                vae=vae,
                file=file_hash(sample.path),
                size=size,
                crop=crop,
                flip=sample.flip,
            )
            make = lambda s=sample: model.encode_image(load_image(s, size, crop))  # noqa: E731
            makers.append(lambda key=key, make=make: load_or_compute(cache, key, make))
        return share_work(self.accelerator, makers)

    def encode_references(self, samples: list[Sample], number: int, size: Size) -> torch.Tensor:
        """Latents (N, C, H, W) of reference `number` of each sample: the mean, as the stock pipelines take."""
        own = [Sample(sample.references[number], flip=sample.flip) for sample in samples]
        crop = STRETCH if self.model.own_reference_size(size) else self.config.crop
        return torch.stack([row["mean"] for row in self.encode_latents(own, size, crop)])

    def latent_mask_weights(self, samples: list[Sample], size: Size, latent: Sequence[int]) -> torch.Tensor:
        """What each latent pixel counts for, (N, 1, H, W), 1 on average over each image."""
        config, least = self.config, self.config.unmasked_weight
        masks = [load_mask(sample, config.masks, size, config.crop) for sample in samples]
        shares = torch.stack([pil_to_tensor(mask).float() / 255 for mask in masks])
        weights = least + (1 - least) * F.interpolate(shares, size=tuple(latent), mode="area")
        return (weights / weights.mean((2, 3), keepdim=True).clamp(min=1e-6)).to(self.accelerator.device)
