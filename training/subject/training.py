"""Training on a folder of images: a loaded model, its data, and what is trained, made ready step by step.

photos + captions -> latents and prompt states (cached) -> noise -> predict (adapted layers) -> loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ...toolkit.core.devices import to_float64
from ...toolkit.core.quantize import move_model
from ...toolkit.core.randomness import generator
from ...toolkit.data.subjects import Sample
from ...toolkit.diffusion.load import open_model
from ...toolkit.diffusion.model import DTYPES, DiffusionModel
from ...toolkit.diffusion.noise import Noise
from ..config.images import DiffusionConfig
from ..engine.block_swap import ignore_waiting_in_ddp, swap_blocks, swapped_numbers
from ..engine.sharding import ignore_shards_in_ddp, shard
from ..engine.task import Trainable
from .batches import ImageBatches
from .data import ImageData, encode_images
from .denoising import DenoisingLoss, TargetGuidance, compile_blocks, repeated_blocks, timestep_weighting
from .drawing_weights import DrawingWeights, drawing
from .preview_base import PreviewBase
from .previews import draw_images
from .prompts import Prompts, preview_texts
from .rows import Rows
from .training_adapter import merge_training_adapter

PREVIEWED_PAIRS = 2


class DiffusionTrainable(Trainable, Protocol):
    """A trainable for diffusion models, and what it does to prompts."""

    @property
    def may_change_text(self) -> bool:
        """Whether `attach` may change text encoders; if not, prompts are encoded before it and the encoders need not stay."""
        ...

    @property
    def token_embeddings(self) -> Mapping[str, torch.Tensor]:
        """Frozen tokens that `attach` has given the text encoders."""
        ...


@dataclass(frozen=True)
class ImageTraining:
    """A diffusion model with a trainable on it, and images: loss, batches and previews."""

    config: DiffusionConfig
    model: DiffusionModel
    noise: Noise
    prompts: Prompts
    data: ImageData
    parts: dict[str, nn.Module]
    """The parts of the model that are trained."""
    batches: ImageBatches
    module: DenoisingLoss
    pairs: tuple[Sample, ...] = ()
    """Samples with references, which previews are made of instead of the preview prompts."""
    drawing_weights: DrawingWeights | None = None
    """What images are drawn with, where the base is trained on with other weights than its own."""
    preview_base: PreviewBase | None = None
    """What images are drawn with instead of the model."""

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`; with a prior, as many class rows after them."""
        return self.batches.batch_at(position, slots)

    def preview(self) -> list[Image.Image]:
        """One image per preview prompt, always from the same noise."""
        if self.pairs:
            texts = [sample.caption or self.config.prompt for sample in self.pairs]
            return self.draw(texts, [self.config.seed + number for number in range(len(texts))], self.pairs)
        texts = preview_texts(self.config)
        return self.draw(texts, [self.config.seed + number for number in range(len(texts))])

    @torch.no_grad()
    def draw(self, texts: Sequence[str], seeds: Sequence[int], pairs: Sequence[Sample] = ()) -> list[Image.Image]:
        """One image per text, by the model as it is; the texts are among the prompts. pairs: see `draw_images`."""
        drawn = self.preview_base or self
        self.module.eval()
        try:
            with drawing(self.drawing_weights):
                return draw_images(drawn.model, drawn.prompts, self.config, texts, seeds, pairs)
        finally:
            drawn.model.release(text=False)
            if self.preview_base:
                self.preview_base.release()
            self.module.train()

    def held_out_batch(self, draws: int, *, seed: int) -> dict[str, torch.Tensor]:
        """Each held-out image `draws` times, with noise and timesteps drawn once."""
        assert self.data.held_out is not None
        (rows,) = self.data.held_out
        return self.fixed_batch(rows, len(rows), draws, seed=seed, stream=9)

    def fixed_batch(self, rows: Rows, count: int, draws: int, *, seed: int, stream: int) -> dict[str, torch.Tensor]:
        """The first `count` images `draws` times each, noise and timesteps drawn once, the timesteps stratified over their range."""
        noise, timesteps, device = [], [], self.batches.device
        for number in range(count * draws):
            random = generator(seed, stream, number)
            noise.append(torch.randn(rows.mean.shape[1:], generator=random))
            fraction = (number % draws + float(torch.rand((), generator=random))) / draws
            timesteps.append(self.noise.timestep_at(fraction, *rows.mean.shape[2:]))
        which = torch.arange(count).repeat_interleave(draws)
        where = which.to(device)
        return {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "posterior_noise": torch.zeros_like(rows.mean[where]),
            "noise": torch.stack(noise).to(device),
            "timesteps": torch.cat(timesteps).to(device),
            "prompt": self.batches.to_lookup_device(rows.prompts[which, 0]),
            "weight": torch.ones(len(where), device=device),
            **{f"reference_{number}": latents[where] for number, latents in enumerate(rows.references)},
        }

    @torch.no_grad()
    def losses_on(self, batch: dict[str, torch.Tensor], rows: int = 32) -> torch.Tensor:
        """Denoising loss of each row (B,) in eval mode, `rows` at a time."""
        self.module.eval()
        starts = range(0, len(batch["weight"]), rows)
        losses = [self.module({key: value[start : start + rows] for key, value in batch.items()}) for start in starts]
        return to_float64(torch.cat(losses))


def prepare_image_training(
    config: DiffusionConfig,
    samples: Sequence[Sample],
    base: str,
    accelerator: Accelerator,
    trainable: DiffusionTrainable,
    *,
    held_out: Sequence[Sample] = (),
    texts: Sequence[str] = (),
    shard_base: bool = False,
    blocks_to_swap: int | str = 0,
    training_adapter: Path | None = None,
    preview_base: PreviewBase | None = None,
    target_guidance: float = 1.0,
) -> ImageTraining:
    """Loads the base and the data, and puts the trainable on.

    Each process makes its share of what is cached and reads the rest. Encoders have done their work before the denoiser is loaded, so
    that the largest parts are never in memory together.

    held_out: images that are made ready and not trained on; texts: more prompts that will be drawn; shard_base: the frozen denoiser
    is sharded over the processes; blocks_to_swap: how many of its blocks wait in main memory; training_adapter: see training_adapter.py;
    preview_base: draws the images; target_guidance: see TargetGuidance.

    Raises:
        UserError: when the trainable does not fit the model.
    """
    model = open_model(base, DTYPES[config.precision], accelerator.device, config.quantize)
    prompts = Prompts(model, config, accelerator)
    data = encode_images(model, prompts, config, accelerator, samples, held_out)
    pairs = tuple(sample for sample in samples if sample.references and not sample.flip)[:PREVIEWED_PAIRS]
    if not model.prompts_see_references:
        prompts.add([*preview_texts(config), "", *texts])  # the empty one is what guidance steers away from
    for sample in (*pairs, *held_out):
        prompts.add([""], sample)
    if not trainable.may_change_text:
        prompts.encode(trainable.token_embeddings)
    model.release(text=prompts.embeds is not None)

    if begins_on_host := shard_base or blocks_to_swap != 0:
        model.device = torch.device("cpu")  # so that no device need hold it whole
    drawing_weights = None if training_adapter is None else merge_training_adapter(model, training_adapter)
    parts = trainable.attach(model)
    if begins_on_host:
        place_blocks(model, accelerator.device, blocks_to_swap)
        others = [part for part in parts.values() if part is not model.denoiser]
        for part in [*others, *(drawing_weights.waiting_quantized if drawing_weights else ())]:
            move_model(part, accelerator.device)
    text_parts = [part for name, part in parts.items() if name != model.denoiser_name]
    if prompts.embeds is None and not text_parts:
        prompts.encode(trainable.token_embeddings)
    model.release(text=not text_parts)
    save_memory_and_time(config, model, text_parts)

    noise = model.noise(config.timestep_sampling, config.timestep_shift)
    batches = ImageBatches(
        config,
        noise,
        accelerator.device,
        data.instance,
        data.prior,
        host_prompts=prompts.embeds is None,
        shards_base=shard_base,
    )
    guidance = TargetGuidance(target_guidance, int(prompts.numbers_of([""]))) if target_guidance != 1 else None
    module = DenoisingLoss(model, parts, noise, prompts.embeds_of, timestep_weighting(config), guidance).train()
    if shard_base:
        ignore_shards_in_ddp(module)
    if blocks_to_swap:
        ignore_waiting_in_ddp(module)
    return ImageTraining(
        config, model, noise, prompts, data, parts, batches, module, pairs, drawing_weights, preview_base
    )


def place_blocks(model: DiffusionModel, device: torch.device, blocks_to_swap: int | str) -> None:
    """Brings an adapted denoiser from main memory to the device, with some blocks swapped, or else all of them sharded."""
    blocks = repeated_blocks(model.denoiser)
    if blocks_to_swap:
        swapped = [blocks[number] for number in swapped_numbers(blocks_to_swap, len(blocks))]
        swap_blocks(model.denoiser, swapped, device)
    else:
        shard(model.denoiser, blocks, device)
    model.device = device


def save_memory_and_time(config: DiffusionConfig, model: DiffusionModel, text_parts: Sequence[nn.Module]) -> None:
    """Compiles the denoiser's blocks, and lets trained parts keep fewer activations, as the config says."""
    if config.compile:
        compile_blocks(model.denoiser)
    if config.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        for part in text_parts:
            part.gradient_checkpointing_enable()  # type: ignore[operator]
