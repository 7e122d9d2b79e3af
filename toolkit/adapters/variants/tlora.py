"""T-LoRA: fewer ranks at work where there is more noise (Soboleva et al. 2025, arXiv 2507.05964).

    y = W x + (alpha / r) * (up @ mask @ diag(scale) @ down - base_up @ mask @ base_down) @ x
    mask = diag(1, ..., 1, 0, ..., 0) with r(t) ones,  r(t) = floor((r - r_min) * (T - t) / T) + r_min

t / T is how noisy the latents are: 1 for pure noise, where few ranks may learn, since there a few images are learned by heart. Training
and sampling both follow the schedule; r_min is `min_share` of r.

`init="orthogonal"` is the paper's T-LoRA: down (r, in), scale (r,) and up (out, r) start from the last singular components of a random
matrix, so that ranks that are masked carry nothing of the others; their start, base_up and base_down, is taken off again, and is kept
in the file, which is twice as large as LoRA's. `init="lora"` is the paper's Vanilla T-LoRA: LoRA's start, and nothing to take off.

Use it for subjects of very few images, on diffusion models only. The weight changes with the timestep, so it cannot be merged; sampling
here, and in any pipeline that is given the adapter through PEFT, applies the schedule. Other tools' LoRA has none:
`rankfold export --approximate` writes the mean over all noise levels, of rank 2 r (r for "lora"), and says its error. In a trial (`tiny`,
rank 8, 20 steps) it missed 0.19 of a layer's effect at the median and 0.46 at most; all ranks at full strength missed 0.27 and 0.84
(by hand, on one adapter: no command repeats it).
Layers of text encoders, which the paper leaves as they are, see no timestep and use all ranks. Deviations from the
released code: the random matrix is not decomposed, since its singular vectors are random orthonormal ones and its singular values lie
where they lie for all such matrices; each row of a batch has its own r(t); in flow models t / T is sigma.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer, NotLinearError
from ..noise_level import watch_noise_level

INITS = ("orthogonal", "lora")
ROUNDING = 1e-4  # of a rank: what a timestep in single precision may fall short of a whole one


@dataclass
class TLoraConfig(AdapterConfig):
    """Config of T-LoRA."""

    min_share: float = field(
        default=0.5, metadata={"help": "Share of the ranks that is at work at pure noise, above 0; 1 is no schedule."}
    )
    init: str = field(
        default="orthogonal",
        metadata={"help": "orthogonal (the paper's T-LoRA) or lora (its Vanilla T-LoRA: down random, up zero)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("init", INITS)
        if not 0 < self.min_share <= 1:
            raise ValueError(f"min_share must be above 0 and at most 1, not {self.min_share!r}.")


class TLoraLayer(AdapterLayer, name="tlora", config=TLoraConfig):
    """Linear with T-LoRA."""

    supported_layers = (nn.Linear,)
    follows_noise = True

    def __init__(self, base_layer: nn.Module, layer_name: str = "", model: nn.Module | None = None) -> None:
        super().__init__(base_layer, layer_name, model)
        self.noise_level = watch_noise_level(model, layer_name)

    def init_tensors(self, config: TLoraConfig, r: int) -> dict[str, torch.Tensor]:
        down, up = torch.empty(r, self.fan_in), torch.zeros(self.fan_out, r)
        if config.init == "lora":
            nn.init.normal_(down, std=1 / r)
            return {"down": down, "up": up}
        nn.init.orthogonal_(down)
        nn.init.orthogonal_(up)
        scale = up.new_empty(r) if up.is_meta else last_singular_values(self.fan_in, self.fan_out, r) / r
        start = {"base_down": scale[:, None] * down, "base_up": up.clone()}
        if not config.init_weights:
            nn.init.normal_(up)
        return {"down": down, "scale": scale, "up": up, **start}

    def frozen_tensors(self, config: TLoraConfig) -> tuple[str, ...]:
        return ("base_down", "base_up")

    def is_linear(self, adapter: str) -> bool:
        return False

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        raise NotLinearError(
            "T-LoRA cannot be merged or folded exactly: how many of its ranks are at work depends on the timestep. "
            "Keep it as an adapter, export an approximation, or train another adapter."
        )

    def input_projection(self, adapter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return factors(tensors)[0]

    def nonlinear_delta(
        self, adapter: str, tensors: dict[str, torch.Tensor], projected: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up = factors(tensors)[1]
        level_B = None if self.noise_level is None else self.noise_level.level_B
        if level_B is None:
            return projected, up
        if len(projected) % len(level_B):
            raise ValueError(
                f"{self.layer_name} is given {len(projected)} rows at once, and the denoiser {len(level_B)} timesteps, so T-LoRA cannot "
                "tell which are whose: leave this layer out of the target modules, or take a batch of 1."
            )
        r = self.r[adapter]
        places = torch.arange(up.shape[1], device=level_B.device) % r
        mask = places < active_ranks(level_B, r, self.min_rank(adapter))[:, None]
        if len(mask) > 1:  # a block may work on each token of a sample as a row of its own, one sample behind the other
            mask = mask.repeat_interleave(len(projected) // len(mask), 0)
        return projected * mask.view(len(mask), *[1] * (projected.dim() - 2), -1).to(projected), up

    def min_rank(self, adapter: str) -> int:
        """Ranks at work at pure noise."""
        return max(1, round(self.settings[adapter].min_share * self.r[adapter]))

    def nearest_change(self, adapter: str) -> Change:
        """The mean change over all noise levels alike, before the scaling: of all that are the same at every level, the nearest."""
        r, least = self.r[adapter], self.min_rank(adapter)
        place = torch.arange(r)
        share = torch.ones(r) if self.noise_level is None else 1 - (place - least + 1).clamp(min=0) / max(1, r - least)
        down, up = factors({key: value.detach().float() for key, value in self.tensors(adapter).items()})
        return Change(down=share.to(down).repeat(len(down) // r)[:, None] * down, up=up)


def factors(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The change without a mask as factors (k, in) and (out, k); in each block of r, the places of the ranks.

    up @ d - base_up @ base_d is written as (up - base_up) @ d + base_up @ (d - base_d), which is nothing to the bit at the start.
    """
    down, up = tensors["down"], tensors["up"]
    if "scale" not in tensors:
        return down, up
    down, base_down, base_up = tensors["scale"][:, None] * down, tensors["base_down"], tensors["base_up"]
    return torch.cat((down, down - base_down)), torch.cat((up - base_up, base_up), 1)


def active_ranks(level_B: torch.Tensor, r: int, least: int) -> torch.Tensor:
    """Ranks at work at these noise levels, (B,)."""
    return torch.floor((r - least) * (1 - level_B) + ROUNDING) + least


def last_singular_values(fan_in: int, fan_out: int, r: int) -> torch.Tensor:
    """The r least singular values, falling, (r,), of a matrix (fan_out, fan_in) of independent N(0, 1); past its rank the least again.

    Their places by the law of Marchenko and Pastur (1967), which all such matrices are near to: nothing is drawn or decomposed.
    """
    long, short = max(fan_in, fan_out), min(fan_in, fan_out)
    low, high = long**0.5 - short**0.5, long**0.5 + short**0.5
    way = (1 - torch.linspace(0, torch.pi, 100_001, dtype=torch.float64).cos()) / 2
    s = low + (high - low) * way
    density = ((high**2 - s**2).clamp(min=0) * (s**2 - low**2).clamp(min=0)).sqrt() / s.clamp(min=1e-9)
    below = torch.cumulative_trapezoid(density, s)
    wanted = (torch.arange(min(r, short), dtype=torch.float64) + 0.5) / short
    found = s[1:][torch.searchsorted(below / below[-1], wanted)].float().flip(0)
    return torch.cat((found, found[-1:].expand(r - len(found))))
