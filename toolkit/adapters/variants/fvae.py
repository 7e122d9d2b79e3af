"""FVAE-LoRA: a VAE splits the layer's input into a task-salient part and the rest (Kumar et al. 2025, arXiv 2510.19640).

    mean_k, logvar_k = heads_k(dropout(act(trunk_k x)))      two encoders, k = 1, 2, with nothing in common
    z_k = mean_k + exp(logvar_k / 2) * noise                 z_1 carries the task; in eval it is its mean
    y = W x + b + alpha / (r + 1e-5) * up @ z_1
    x' = decoder(fuse(z_1, z_2))                             only for the auxiliary loss

The auxiliary loss, to be minimised, is the mean over layers of

    reconstruction * R + kl * K + z2 * mean((z_2 - z2_mean)^2) - z1 * mean(z_1^2)

with R the negative Gaussian log-likelihood of x under x' and a learned deviation (summed over width, mean over tokens), and K
the divergence of z_1 from N(0, I) (summed over the latent, mean over tokens). The signs are those of the released code: z_2
is pulled to its prior's mean, z_1 is pushed away from zero and held by K. The code multiplies the task loss by 1000; we
divide the auxiliary loss by it instead (loss_weight), which Adam cannot tell apart and gradient clipping can.

With a ReLU the adapter is not linear in x and cannot be merged. encoder_activation="identity" is our variant: it folds
exactly into LoRA of rank r and a bias. Decoder, second encoder and the variance head are not run in eval; a run's adapter goes
without them, and PEFT's `save_pretrained` keeps them, so that training can go on.

Use it where the training images carry something that must not be learned with the subject (a background, a style). It costs
most in training and little in use. Deviations from the released code: the auxiliary loss is handed to the loop (the code keeps
graphs on the modules and counts them twice under checkpointing), leaves padding out, does not reach the layers below unless
detach=False, and settings whose loss has no lower bound are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ...core.change import Change
from .. import auxiliary
from ..base import AdapterConfig, AdapterLayer, NotLinearError
from .fvae_objective import dropout_, gaussian_kl, reconstruction_nll, token_mean

FUSIONS = ("concat", "average")
ACTIVATIONS = ("relu", "identity")
UP_INITS = ("normal", "zeros")


@dataclass
class FvaeLoraConfig(AdapterConfig):
    """Config of FVAE-LoRA; r is the width of each latent, alpha is 8 in the released code."""

    encoder_width: int | None = field(default=None, metadata={"help": "Width of the encoders' trunk; unset means r."})
    encoder_dropout: float = field(default=0.1, metadata={"help": "Dropout after the trunk, in [0, 1)."})
    encoder_activation: str = field(
        default="relu", metadata={"help": "relu (the paper's), or identity (ours: folds exactly into LoRA)."}
    )
    decoder_width: int = field(default=128, metadata={"help": "Width of the decoder's hidden layers."})
    decoder_layers: int = field(default=3, metadata={"help": "Number of the decoder's hidden layers, 1 or more."})
    decoder_dropout: float = field(default=0.1, metadata={"help": "Dropout after each of them, in [0, 1)."})
    fusion: str = field(default="concat", metadata={"help": "What the decoder sees of z_1 and z_2: concat or average."})
    reconstruction: float = field(default=1.0, metadata={"help": "Weight of the reconstruction, 0 or more."})
    kl: float = field(default=1.0, metadata={"help": "Weight of the divergence of z_1 from N(0, I), 0 or more."})
    z1: float = field(default=1.0, metadata={"help": "Weight that pushes z_1 away from zero; below kl * r / 2."})
    z2: float = field(default=1.0, metadata={"help": "Weight that pulls z_2 to its prior's mean, 0 or more."})
    z2_mean: float = field(default=1.5, metadata={"help": "Mean of z_2's prior."})
    loss_weight: float = field(
        default=1e-3, metadata={"help": "Weight of the auxiliary loss beside the task's; 0 leaves it out."}
    )
    detach: bool = field(
        default=True,
        metadata={
            "help": "Keep the reconstruction's gradient from the layers below (the released code lets it through)."
        },
    )
    up_init: str = field(
        default="normal",
        metadata={
            "help": "normal: std 0.02, as released, so training starts with noise in every layer (eval does not: z_1 is 0); "
            "zeros: training starts as the base model, and slower."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("fusion", FUSIONS)
        self.check_choice("encoder_activation", ACTIVATIONS)
        self.check_choice("up_init", UP_INITS)
        for name in ("decoder_width", "decoder_layers"):
            self.check_minimum(name, 1)
        if self.encoder_width is not None:
            self.check_minimum("encoder_width", 1)
        for name in ("reconstruction", "kl", "z1", "z2", "loss_weight"):
            self.check_minimum(name, 0)
        for name in ("encoder_dropout", "decoder_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)!r}.")
        least = min([self.r, *self.rank_pattern.values()])
        if self.loss_weight and self.z1 and not self.z1 < self.kl * least / 2:
            raise ValueError(
                f"z1 must be below kl * r / 2 = {self.kl * least / 2}, not {self.z1}: otherwise the loss has no lower bound "
                "and z_1 grows for ever. Lower z1, or raise kl or r."
            )


class FvaeLoraLayer(AdapterLayer, name="fvae", config=FvaeLoraConfig):
    """Linear with FVAE-LoRA."""

    supported_layers = (nn.Linear,)
    auxiliary_only = ("trunk2", "mean2", "logvar2", "decoder")
    training_only = ("logvar1", *auxiliary_only)

    def init_tensors(self, config: FvaeLoraConfig, r: int) -> dict[str, torch.Tensor]:
        width, tensors = config.encoder_width or r, {}
        up = torch.zeros(self.fan_out, r)
        if config.up_init == "normal":
            nn.init.normal_(up, std=0.02)
        tensors["up"] = up
        for k in ("1", "2"):
            tensors |= init_linear(f"trunk{k}", self.fan_in, width)
            for head in ("mean", "logvar"):
                tensors |= {f"{head}{k}_weight": torch.zeros(r, width), f"{head}{k}_bias": torch.zeros(r)}
            if not config.init_weights:  # up is small already, and two small factors are next to nothing
                tensors |= init_linear(f"mean{k}", width, r)
        widths = [r if config.fusion == "average" else 2 * r, *[config.decoder_width] * config.decoder_layers]
        for number, (here, there) in enumerate(pairwise(widths)):
            tensors |= init_linear(f"decoder{number}", here, there)
        tensors |= init_linear("decoder_out", config.decoder_width, self.fan_in)
        tensors["decoder_std"] = torch.ones(self.fan_in)
        if config.inference_mode or not config.loss_weight:
            kept = ("logvar1",) if not config.inference_mode else ()
            tensors = {k: v for k, v in tensors.items() if k.startswith(kept) or not k.startswith(self.training_only)}
        return tensors

    def initial_scaling(self, adapter: str) -> float:
        return self.alpha[adapter] / (self.r[adapter] + 1e-5)

    def is_linear(self, adapter: str) -> bool:
        return not self.training and self.settings[adapter].encoder_activation == "identity"

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        if self.settings[adapter].encoder_activation != "identity":
            raise NotLinearError(
                "FVAE-LoRA with encoder_activation='relu' cannot be merged or folded exactly: it is not linear in its input. "
                "Keep it as an adapter, export an approximation, or train with encoder_activation='identity'."
            )
        t = tensors
        return Change(
            down=t["mean1_weight"] @ t["trunk1_weight"],
            up=t["up"],
            bias=t["up"] @ (t["mean1_weight"] @ t["trunk1_bias"] + t["mean1_bias"]),
        )

    def input_projection(self, adapter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return tensors["trunk1_weight"]

    def nonlinear_delta(
        self, adapter: str, tensors: dict[str, torch.Tensor], projected: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = {key: value.to(x.dtype) for key, value in tensors.items()}
        if not self.training:
            return affine(t, "mean1", self.trunk(adapter, t, projected, "1")), t["up"]
        code = self.encode(adapter, t, projected, "1")
        if self.settings[adapter].loss_weight and auxiliary.should_compute_loss():
            loss = self.auxiliary_loss(adapter, t, x, code)
            if (collected := auxiliary.current_collector()) is not None:
                collected.add(adapter, loss)
        return code.z, t["up"]

    def trunk(self, adapter: str, t: dict[str, torch.Tensor], read: torch.Tensor, k: str) -> torch.Tensor:
        """Hidden layer of encoder k, (..., encoder_width), from what its weight reads of the input, of the same shape."""
        config = self.settings[adapter]
        hidden = read + t[f"trunk{k}_bias"]
        if self.training:  # before the ReLU, which commutes with it, so that it may work in place
            hidden = dropout_(hidden, config.encoder_dropout)
        return F.relu(hidden) if config.encoder_activation == "relu" else hidden

    def encode(self, adapter: str, t: dict[str, torch.Tensor], read: torch.Tensor, k: str) -> Code:
        """The code of encoder k, from what its trunk's weight reads of the input, (..., encoder_width)."""
        hidden = self.trunk(adapter, t, read, k)
        mean, logvar = affine(t, f"mean{k}", hidden), F.hardtanh(affine(t, f"logvar{k}", hidden), -20, 20)
        return Code(mean, logvar, mean + (0.5 * logvar).exp() * torch.randn_like(mean))

    def auxiliary_loss(self, adapter: str, t: dict[str, torch.Tensor], x: torch.Tensor, code: Code) -> torch.Tensor:
        """loss_weight times the objective of this layer, a scalar."""
        config = self.settings[adapter]
        source = x.detach() if config.detach else x
        code2 = self.encode(adapter, t, F.linear(source, t["trunk2_weight"]), "2")
        terms = self.loss_terms(adapter, t, source, code, code2, auxiliary.token_weights(x))
        total = (
            config.reconstruction * terms["reconstruction"]
            + config.kl * terms["kl_z1"]
            + config.z2 * terms["z2_l2"]
            - config.z1 * terms["z1_l2"]
        )
        return config.loss_weight * total

    def loss_terms(
        self, adapter: str, t: dict[str, torch.Tensor], x: torch.Tensor, code1: Code, code2: Code, weights: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of the objective, scalars; weights (...) of the tokens sum to 1."""
        config, z1, z2 = self.settings[adapter], code1.z, code2.z
        names = [*(f"decoder{number}" for number in range(config.decoder_layers)), "decoder_out"]
        *hidden, out = [(t[f"{name}_weight"], t[f"{name}_bias"]) for name in names]
        fused = torch.cat((z1, z2), -1) if config.fusion == "concat" else (z1 + z2) / 2
        return {
            "reconstruction": reconstruction_nll(
                fused, hidden, out, t["decoder_std"], x, weights, config.decoder_dropout
            ),
            "kl_z1": gaussian_kl(code1.mean, code1.logvar, weights),
            "z1_l2": token_mean(z1.square().mean(-1), weights),
            "z2_l2": token_mean((z2 - config.z2_mean).square().mean(-1), weights),
        }


@dataclass(frozen=True)
class Code:
    """What an encoder says of the tokens, each (..., r): a normal distribution, and a draw z from it."""

    mean: torch.Tensor
    logvar: torch.Tensor
    z: torch.Tensor


def affine(t: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """x (..., in) through the named weight and bias, (..., out)."""
    return F.linear(x, t[f"{name}_weight"], t[f"{name}_bias"])


def init_linear(name: str, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
    """Weight and bias as torch.nn.Linear starts them."""
    layer = nn.Linear(fan_in, fan_out)
    return {f"{name}_weight": layer.weight.data, f"{name}_bias": layer.bias.data}
