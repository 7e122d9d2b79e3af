"""How noisy the latents are that a denoiser is at work on, for variants whose formula depends on it.

A denoiser is told a timestep in every call, whoever calls it: training, a stock pipeline, regions. It is read there, before the forward
pass, and kept until the next one, so that gradient checkpointing finds it when it runs a block again in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TIMESTEPS = 1000


def from_timestep(timestep: torch.Tensor, denoiser: Any) -> torch.Tensor:
    """Timesteps (B,) from 0 to 1000 -> noise levels."""
    return timestep / TIMESTEPS


def from_sigma(sigma: torch.Tensor, denoiser: Any) -> torch.Tensor:
    """Sigmas (B,) are noise levels."""
    return sigma


def from_progress(progress: torch.Tensor, denoiser: Any) -> torch.Tensor:
    """Time that runs from noise to image, (B,) from 0 to 1 -> noise levels."""
    return 1 - progress


def from_scaled_timestep(timestep: torch.Tensor, denoiser: Any) -> torch.Tensor:
    """Timesteps (B,) times the denoiser's own scale -> noise levels."""
    return timestep / TIMESTEPS / denoiser.config.timestep_scale


READERS: dict[str, tuple[str, Callable[[torch.Tensor, Any], torch.Tensor]]] = {
    "ChromaTransformer2DModel": ("timestep", from_sigma),
    "ErnieImageTransformer2DModel": ("timestep", from_timestep),
    "Flux2Transformer2DModel": ("timestep", from_sigma),
    "FluxTransformer2DModel": ("timestep", from_sigma),
    "Krea2Transformer2DModel": ("timestep", from_sigma),
    "Lumina2Transformer2DModel": ("timestep", from_progress),
    "QwenImageTransformer2DModel": ("timestep", from_sigma),
    "SD3Transformer2DModel": ("timestep", from_timestep),
    "SanaTransformer2DModel": ("timestep", from_scaled_timestep),
    "UNet2DConditionModel": ("timestep", from_timestep),
    "ZImageTransformer2DModel": ("t", from_progress),
}
"""Class of a denoiser -> the argument of its forward that says how noisy the latents are, and what makes a noise level of it."""


class NoiseLevel:
    """The noise level of a denoiser's latest call: 0 for an image, 1 for pure noise."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.level_B: torch.Tensor | None = None
        """One for each row of the batch, or one for all; None before the first call."""
        self.argument, self.convert = READERS[type(denoiser).__name__]
        names = list(inspect.signature(type(denoiser).forward).parameters)
        self.position = names.index(self.argument) - 1  # without self

    def read(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads it off a call: a hook before the denoiser's forward."""
        given = kwargs[self.argument] if self.argument in kwargs else args[self.position]
        self.level_B = self.convert(torch.as_tensor(given).detach().float().reshape(-1), denoiser)


def watch_noise_level(model: nn.Module | None, layer: str) -> NoiseLevel | None:
    """The noise level of the denoiser that a layer of the model is in; None in a text encoder, or any model that is told none.

    Raises:
        ValueError: for a denoiser of a class that is not among READERS.
    """
    if model is None:
        return None
    path = [model]
    for name in layer.split(".")[:-1]:
        path.append(getattr(path[-1], name))
    for module in path:
        kind = type(module).__name__
        if kind in READERS:
            if not hasattr(module, "rankfold_noise_level"):
                module.rankfold_noise_level = NoiseLevel(module)  # type: ignore[assignment]
                module.register_forward_pre_hook(module.rankfold_noise_level.read, with_kwargs=True)  # type: ignore[attr-defined]
            return module.rankfold_noise_level  # type: ignore[return-value]
        if "timestep" in inspect.signature(type(module).forward).parameters:
            raise ValueError(
                f"a {kind} is told the timestep in a way that is not known, so an adapter that depends on it cannot be put on it."
            )
    return None
