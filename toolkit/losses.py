"""Noise, targets and weights of the denoising loss, for the schedulers of diffusers.

Convention: noisy = sqrt(a_t) clean + sqrt(1 - a_t) noise, with a_t = scheduler.alphas_cumprod[t]; snr = a_t / (1 - a_t).
Shapes: B batch, C H W latents.
"""

from __future__ import annotations

import torch


def snr(alphas_cumprod_T: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio (B,) at the timesteps."""
    alpha = alphas_cumprod_T[timesteps_B]
    return alpha / (1 - alpha)


def target(
    kind: str,
    alphas_cumprod_T: torch.Tensor,
    clean_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
) -> torch.Tensor:
    """What the denoiser should predict: the noise (epsilon) or sqrt(a) noise - sqrt(1 - a) clean (v_prediction).

    Raises:
        ValueError: for another kind of prediction.
    """
    if kind == "epsilon":
        return noise_BCHW
    if kind == "v_prediction":
        alpha = alphas_cumprod_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise_BCHW - (1 - alpha).sqrt() * clean_BCHW
    raise ValueError(f"Cannot train a model that predicts '{kind}'; epsilon and v_prediction are known.")


def add_noise(
    alphas_cumprod_T: torch.Tensor, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor
) -> torch.Tensor:
    """Clean latents mixed with noise at the timesteps."""
    alpha = alphas_cumprod_T[timesteps_B].view(-1, 1, 1, 1)
    return alpha.sqrt() * clean_BCHW + (1 - alpha).sqrt() * noise_BCHW


def min_snr_weight(kind: str, snr_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights (B,): min(snr, gamma) / snr for epsilon, / (snr + 1) for v (Hang et al. 2023, eq. 6 and 7).

    At zero terminal SNR the epsilon weight is 0 / 0; its limit, 1, is used.
    """
    clipped = snr_B.clamp(max=gamma)
    if kind == "v_prediction":
        return clipped / (snr_B + 1)
    return torch.where(snr_B > 0, clipped / snr_B.clamp(min=1e-12), torch.ones_like(snr_B))


def per_sample_mse(guess: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each row, (B,), in fp32."""
    return (guess.float() - goal.float()).square().flatten(1).mean(1)
