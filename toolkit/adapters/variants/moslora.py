"""MoSLoRA: a learned r x r mixer between LoRA's two factors (Wu et al. 2024, arXiv 2406.11909).

    y = W x + (alpha / r) * up @ mixer @ down @ x        down (r, in), mixer (r, r), up (out, r)

The mixer lets every row of `down` meet every column of `up`. It folds exactly into plain LoRA of the same rank:
down' = mixer @ down. Under plain gradient descent a fixed orthogonal mixer is LoRA with rotated `down`; only a learned one
changes the path of training, so `mixer="frozen"` is the ablation to compare with.

Use it where you would use LoRA: same file, same speed, r * r more parameters per layer. The released diffusion script starts from an
orthogonal mixer, its language-model code from a Kaiming one; both are here. Its zero start (an option there) never trains, so it
is refused. Works on linear layers and convolutions of any kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer

MIXERS = ("learned", "frozen", "identity")
INITS = ("orthogonal", "kaiming", "gaussian")


@dataclass
class MosLoraConfig(AdapterConfig):
    """Config of MoSLoRA."""

    mixer: str = field(
        default="learned",
        metadata={
            "help": "learned; frozen: stays as it starts (ablation); identity: frozen at I, which is plain LoRA."
        },
    )
    mixer_init: str = field(
        default="orthogonal",
        metadata={
            "help": "orthogonal (the paper's for diffusion), kaiming: U(+-1/sqrt(r)), or gaussian: std 1/sqrt(r)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("mixer", MIXERS)
        if self.mixer_init not in INITS:
            raise ValueError(
                f"mixer_init must be one of {', '.join(INITS)}, not '{self.mixer_init}' (a zero mixer never trains)."
            )


class MosLoraLayer(AdapterLayer, name="moslora", config=MosLoraConfig):
    """A linear layer or a convolution with MoSLoRA."""

    def init_tensors(self, config: MosLoraConfig, r: int) -> dict[str, torch.Tensor]:
        down = torch.empty(r, self.fan_in)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        mixer = torch.eye(r)
        if config.mixer != "identity":
            {"orthogonal": nn.init.orthogonal_, "kaiming": init_kaiming, "gaussian": init_gaussian}[config.mixer_init](
                mixer
            )
        return {"down": down, "mixer": mixer, "up": torch.zeros(self.fan_out, r)}

    def frozen_tensors(self, config: MosLoraConfig) -> tuple[str, ...]:
        return () if config.mixer == "learned" else ("mixer",)

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        return Change(down=tensors["mixer"] @ tensors["down"], up=tensors["up"])


def init_kaiming(mixer: torch.Tensor) -> None:
    """Draws the mixer (r, r) as torch.nn.Linear draws its weight."""
    nn.init.kaiming_uniform_(mixer, a=math.sqrt(5))


def init_gaussian(mixer: torch.Tensor) -> None:
    """Draws the mixer (r, r) with the standard deviation 1 / sqrt(r)."""
    nn.init.normal_(mixer, std=1 / math.sqrt(mixer.shape[0]))
