"""FLUX.2's autoencoder: latents in squares of 2 x 2, normalised by the statistics that it keeps. A base class of families that have it."""

from __future__ import annotations

from typing import Any

import torch

from .model import DiffusionModel


class PatchedLatentsModel(DiffusionModel):
    """A family before FLUX.2's autoencoder."""

    patch_size = 1  # latents are squares of 2 x 2 already
    autoencoders = ("AutoencoderKLFlux2",)

    @property
    def latent_scale(self) -> int:
        return 2 * super().latent_scale

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    @classmethod
    def norm_eps(cls, vae: Any) -> float:
        """What the stock pipeline adds to the variance."""
        return vae.config.batch_norm_eps

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return normalized_patches(self.vae, pixels, self.norm_eps(self.vae))

    @classmethod
    def decode_latents(cls, vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return decode_patches(vae, latents_BCHW, cls.norm_eps(vae))


def normalized_patches(vae: Any, pixels: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (B, 4C, H/2, W/2) of the latents of pixels (B, 3, ...), normalised by the autoencoder's statistics."""
    posterior = vae.encode(pixels).latent_dist
    mean, std = patch_statistics(vae, eps)
    return (patchify(posterior.mean) - mean) / std, patchify(posterior.std) / std


def decode_patches(vae: Any, latents_BCHW: torch.Tensor, eps: float) -> torch.Tensor:
    """The inverse: normalised patches -> pixels (B, 3, ...)."""
    mean, std = patch_statistics(vae, eps)
    return vae.decode(torch.nn.functional.pixel_shuffle(latents_BCHW * std + mean, 2).to(vae.dtype)).sample


def patch_statistics(vae: Any, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the patched latents, each (1, C, 1, 1)."""
    return vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var + eps).sqrt().view(1, -1, 1, 1)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) with each square of 2 x 2 as channels, (B, 4C, H/2, W/2)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)
