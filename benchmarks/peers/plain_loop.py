"""The loop of a DreamBooth LoRA example script, short: VAE and text encoder run in every step. Adapters are the caller's."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.nn.functional import mse_loss
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class Parts:
    """A Stable Diffusion model, frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args()


def load_parts(base: str) -> Parts:
    """The base's models in fp32."""
    return Parts(
        CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"),
        CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32).requires_grad_(False),
        AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32).requires_grad_(False),
        UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False),
        DDPMScheduler.from_pretrained(base, subfolder="scheduler"),
    )


def batches(folder: Path, side: int, size: int) -> Iterator[torch.Tensor]:
    """Pixels in -1 to 1, of shape (size, 3, side, side), for ever."""
    prepare = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    pixels_N3HW = torch.stack([prepare(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))])
    while True:
        order = itertools.cycle(torch.randperm(len(pixels_N3HW)).tolist())
        yield pixels_N3HW[list(itertools.islice(order, size))]


def train(options: argparse.Namespace, adapt: Callable[[Parts, int], list[nn.Parameter]]) -> Parts:
    """Trains what `adapt` puts onto the parts and returns; gives the parts with it."""
    torch.manual_seed(options.seed)
    parts = load_parts(options.base)
    parameters = adapt(parts, options.rank)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    ids = parts.tokenizer(options.prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    side = parts.unet.config.sample_size * 2 ** (len(parts.vae.config.block_out_channels) - 1)
    for pixels_B3HW in itertools.islice(batches(options.images, side, options.batch_size), options.steps):
        loss = denoising_loss(parts, pixels_B3HW, ids.expand(len(pixels_B3HW), -1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return parts


def denoising_loss(parts: Parts, pixels_B3HW: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the noise, or the velocity, at timesteps by chance."""
    with torch.no_grad():
        latents_B4HW = parts.vae.encode(pixels_B3HW).latent_dist.sample() * parts.vae.config.scaling_factor
    states = parts.text_encoder(ids_BL)[0]
    noise = torch.randn_like(latents_B4HW)
    timesteps_B = torch.randint(0, parts.scheduler.config.num_train_timesteps, (len(latents_B4HW),))
    noisy = parts.scheduler.add_noise(latents_B4HW, noise, timesteps_B)
    velocity = parts.scheduler.config.prediction_type == "v_prediction"
    target = parts.scheduler.get_velocity(latents_B4HW, noise, timesteps_B) if velocity else noise
    return mse_loss(parts.unet(noisy, timesteps_B, states).sample, target)


if __name__ == "__main__":
    raise SystemExit("This is the loop of peft_loop.py and lycoris_loop.py.")
