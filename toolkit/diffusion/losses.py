"""Targets and weights of the denoising loss, on top of the schedulers of diffusers.

Convention: noisy = sqrt(a_t) clean + sqrt(1 - a_t) noise, with a_t = scheduler.alphas_cumprod[t]; snr = a_t / (1 - a_t).
Shapes as in docs/design.md.
"""

from __future__ import annotations

from typing import Any

import torch


def target(
    scheduler: Any, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor
) -> torch.Tensor:
    """What the denoiser should predict, (B, C, H, W): the noise (epsilon), or sqrt(a) noise - sqrt(1 - a) clean (v_prediction).

    Raises:
        ValueError: for another kind of prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise_BCHW
    if kind == "v_prediction":
        return scheduler.get_velocity(clean_BCHW, noise_BCHW, timesteps_B)
    raise ValueError(f"Cannot train a model that predicts '{kind}'; epsilon and v_prediction are known.")


def clean_error_ratio(kind: str, snr_B: torch.Tensor) -> torch.Tensor:
    """Squared error of the clean latents over that of the prediction, (B,): 1 / snr for epsilon, 1 / (snr + 1) for v."""
    return 1 / (snr_B + 1 if kind == "v_prediction" else snr_B)


def min_snr_weight(snr_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """What the squared error of the clean latents counts for, (B,): min(snr, gamma) (Hang et al. 2023, section 3.4)."""
    return snr_B.clamp(max=gamma)


def debiased_weight(snr_B: torch.Tensor) -> torch.Tensor:
    """The same by Yu et al. 2024 (arXiv 2310.08442), (B,): sqrt(snr), which is 1 / sqrt(snr) on the error of the noise."""
    return snr_B.sqrt()


def per_sample_mse(
    pred_BCHW: torch.Tensor, target_BCHW: torch.Tensor, weight_B1HW: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each row, (B,), in fp32; weight_B1HW is what each latent pixel counts for."""
    error = (pred_BCHW.float() - target_BCHW.float()).square()
    return (error if weight_B1HW is None else error * weight_B1HW).flatten(1).mean(1)
