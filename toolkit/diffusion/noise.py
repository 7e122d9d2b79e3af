"""How a model's latents are noised, what it is to predict, and where on the way training draws.

    DiscreteNoise   noisy = sqrt(a_t) clean + sqrt(1 - a_t) noise, t a timestep of the scheduler (SD, SDXL)
    FlowNoise       noisy = (1 - s) clean + s noise, s between 0 (clean) and 1; the target is noise - clean (SD 3, FLUX, ...)

Both answer the same questions, so nothing behind them asks which one it is. Shapes as in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from . import losses

MIN_SNR = 1e-12  # where there is nothing but noise, so that weights have their limits there and not 0 / 0


class Noise(Protocol):
    """What training needs to know of a model's noise."""

    def sample_timestep(self, random: torch.Generator, height: int, width: int) -> torch.Tensor:
        """One timestep (a sigma for flow models) to train at, (1,); height and width are the latents'."""
        ...

    def timestep_at(self, fraction: float, height: int, width: int) -> torch.Tensor:
        """The timestep at this fraction of the way from clean to noise, (1,)."""
        ...

    def add_noise(
        self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor, /
    ) -> torch.Tensor:
        """Noisy latents (B, C, H, W)."""
        ...

    def target(self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor, /) -> torch.Tensor:
        """What the model is to predict, (B, C, H, W)."""
        ...

    def snr(self, timesteps_B: torch.Tensor, /) -> torch.Tensor:
        """Signal-to-noise ratio, (B,), above 0."""
        ...

    def clean_error_ratio(self, timesteps_B: torch.Tensor, /) -> torch.Tensor:
        """Squared error of the clean latents over that of the prediction, (B,)."""
        ...


class DiscreteNoise:
    """The noise of a scheduler with timesteps; it predicts the noise (epsilon) or the velocity (v)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.num_timesteps = scheduler, len(scheduler.alphas_cumprod)

    def sample_timestep(self, random: torch.Generator, height: int, width: int) -> torch.Tensor:
        return torch.randint(self.num_timesteps, (1,), generator=random)

    def timestep_at(self, fraction: float, height: int, width: int) -> torch.Tensor:
        return torch.tensor([min(int(fraction * self.num_timesteps), self.num_timesteps - 1)])

    def add_noise(self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(clean_BCHW, noise_BCHW, timesteps_B)

    def target(self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        return losses.target(self.scheduler, clean_BCHW, noise_BCHW, timesteps_B)

    def snr(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        return compute_snr(self.scheduler, timesteps_B).clamp(min=MIN_SNR)

    def clean_error_ratio(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        return losses.clean_error_ratio(self.scheduler.config.prediction_type, self.snr(timesteps_B))


class FlowNoise:
    """The straight way between latents and noise (rectified flow, Esser et al. 2024, arXiv 2403.03206).

    sampling: uniform, logit_normal or mode (section 3.1). shift: of latents of this height and width: sigmas s are drawn as
    shift s / (1 + (shift - 1) s), which for large images puts more of them where the noise is (equation 23).
    """

    def __init__(
        self, sampling: str = "logit_normal", shift: Callable[[int, int], float] = lambda height, width: 1.0
    ) -> None:
        self.sampling, self.shift = sampling, shift

    def sample_timestep(self, random: torch.Generator, height: int, width: int) -> torch.Tensor:
        sigma = compute_density_for_timestep_sampling(
            self.sampling, 1, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=random
        )
        return apply_shift(sigma, self.shift(height, width))

    def timestep_at(self, fraction: float, height: int, width: int) -> torch.Tensor:
        return apply_shift(torch.tensor([fraction]), self.shift(height, width))

    def add_noise(self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, sigmas_B: torch.Tensor) -> torch.Tensor:
        s = sigmas_B.view(-1, *[1] * (clean_BCHW.dim() - 1))
        return (1 - s) * clean_BCHW + s * noise_BCHW

    def target(self, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, sigmas_B: torch.Tensor) -> torch.Tensor:
        return noise_BCHW - clean_BCHW

    def snr(self, sigmas_B: torch.Tensor) -> torch.Tensor:
        return ((1 - sigmas_B) / sigmas_B.clamp(min=1e-6)).square().clamp(min=MIN_SNR)

    def clean_error_ratio(self, sigmas_B: torch.Tensor) -> torch.Tensor:
        """Squared error of the clean latents over that of the velocity, (B,): the error is s times as large."""
        return sigmas_B.square()


def apply_shift(sigmas_B: torch.Tensor, shift: float) -> torch.Tensor:
    """Sigmas (B,) by equation 23 of Esser et al. 2024."""
    return shift * sigmas_B / (1 + (shift - 1) * sigmas_B)
