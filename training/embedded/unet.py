"""The embedded UNet's two rounds of training, and the latents and prompt states that both denoisers learn from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...toolkit.embedded import tiny_sd as tiny
from .loop import BuildTinyConfig, copy_average, fit, load_as_fp32, load_images, shuffled_batches, to_pixels


@torch.no_grad()
def encode_all(config: BuildTinyConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents fp16 (N, 16, 8, 8), prompt states fp16 (words, 24, 128) of the distinct captions, and each row's caption."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    kept = config.work / "latents.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    vae = AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer")
    images = load_images(config)
    latents = [vae.encode(to_pixels(rows)).latent_dist.mean.half() for rows in images.split(250)]
    captions = json.loads((config.work / "captions.json").read_text(encoding="utf-8"))
    distinct = ["", *sorted(set(captions))]
    number = {text: i for i, text in enumerate(distinct)}
    ids = torch.tensor(tokenizer(distinct, padding="max_length", truncation=True).input_ids)
    states = [encoder(rows).last_hidden_state.half() for rows in ids.split(500)]
    made = (
        torch.cat(latents) * vae.config.scaling_factor,
        torch.cat(states),
        torch.tensor([number[t] for t in captions]),
    )
    torch.save(made, kept)
    return made


def train_draft(config: BuildTinyConfig) -> None:
    """The denoiser's first round, from scratch, all timesteps alike."""
    train_round("draft", config, tiny.make_unet(), config.work / "sd-draft", seed=config.seed, lr=1.2e-3, middle=0.0)


def train_unet(config: BuildTinyConfig) -> None:
    """The second round goes on from the first, half of it on the middle timesteps, where shapes are decided."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(config.work / "sd-draft" / "unet", dtype=torch.float32)
    train_round("unet", config, unet, config.out / "sd", seed=config.seed + 1, lr=8e-4, middle=0.5)


def draw_timesteps(n: int, middle: float, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (n,) in 0..999: uniform, but for the share `middle`, which is logit-normal (0, 0.7)."""
    uniform = torch.rand(n, generator=generator)
    centred = (0.7 * torch.randn(n, generator=generator)).sigmoid()
    chosen = torch.where(torch.rand(n, generator=generator) < middle, centred, uniform)
    return (chosen * 1000).long().clamp(max=999)


def train_round(
    stage: str, config: BuildTinyConfig, unet: nn.Module, out: Path, *, seed: int, lr: float, middle: float
) -> None:
    """Trains the denoiser on cached latents with the text encoder frozen; writes its exponential average as a pipeline."""
    from diffusers.training_utils import EMAModel

    latents, states, which = encode_all(config)
    unet.train()
    scheduler = tiny.make_scheduler()
    average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        clean = latents[rows].float()
        words = which[rows].clone()
        words[torch.rand(len(rows), generator=generator) < 0.1] = 0  # the empty prompt, for guidance
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(len(rows), middle, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        pred = unet(noisy, timesteps, encoder_hidden_states=states[words].float()).sample
        return F.mse_loss(pred, target)

    def after(step: int) -> None:
        average.step(unet.parameters())
        if step % 1500 == 0 and step < steps:
            save_pipeline(config, unet, average, config.work / f"{stage}-{step:05d}")

    steps = config.unet_steps
    batches = shuffled_batches(len(latents), 64, steps, seed)
    fit(config, stage, list(unet.parameters()), batches, loss_of, steps=steps, lr=lr, bf16=False, after=after)
    save_pipeline(config, unet, average, out)


def save_pipeline(config: BuildTinyConfig, unet: nn.Module, average, folder: Path) -> None:
    """Writes the whole StableDiffusionPipeline with the averaged denoiser, in fp16."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    shadow = tiny.make_unet()
    copy_average(average, unet, shadow)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer"),
        unet=shadow.half(),
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    load_as_fp32(folder / "text_encoder")
