"""LoRATRF: LoRA and a task-aware filter on the representation (Li et al. 2024, arXiv 2412.09827). Our reading.

The authors released no code and the formula was not to be had, so this is the project's interpretation: the filter passes
of the base layer's output h what points along a learned task vector t (the feature selection of TOAST, arXiv 2305.15542).

    h = W x + b
    g = clamp(h . t / (|h| |t|), 0, 1)                                            one number for each token
    y = h + (alpha / r) * up @ down @ x + filter_scale * filter_up @ filter_down @ (g h)

A random t is nearly orthogonal to every h: half the tokens get g = 0 and the rest a few hundredths, so the filter hardly
learns. By default t is therefore calibrated: the mean of h over the first batch.

The gate depends on the token, so "cosine" and "code" cannot be merged. Three other readings are at hand as `filter`:

    code       up @ (sigmoid(E d) * d), d = down @ x: the gate on the low-rank code; no representation is edited
    edit       h * (1 + scale) + shift, as RED (arXiv 2402.15179); linear, so it merges
    subspace   h + R' (A h + c - R h), as LoReFT (arXiv 2404.03592) without its orthogonality; linear, so it merges

Use it, with a smaller rank, where few numbers must do; the paper claims two thirds of LoRA's. The gate is computed in fp32 under
any precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer, NotLinearError

FILTERS = ("cosine", "code", "edit", "subspace")
TASKS = ("calibrated", "random")


@dataclass
class LoraTrfConfig(AdapterConfig):
    """Config of LoRATRF, in our reading of it."""

    uses_base_weight: ClassVar[bool] = True

    filter: str = field(
        default="cosine",
        metadata={"help": "cosine: gate on the output (our reading); code, edit, subspace: other readings."},
    )
    filter_r: int = field(default=4, metadata={"help": "Rank of the filter (cosine, subspace), 1 or more."})
    filter_scale: float = field(default=1.0, metadata={"help": "Factor of the filter's part, above 0."})
    task: str = field(
        default="calibrated",
        metadata={"help": "Start of the task vector: calibrated (mean output of the first batch) or random N(0, 1)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("filter", FILTERS)
        self.check_choice("task", TASKS)
        self.check_minimum("filter_r", 1)
        if not self.filter_scale > 0:
            raise ValueError(f"filter_scale must be above 0, not {self.filter_scale!r}.")


class LoraTrfLayer(AdapterLayer, name="loratrf", config=LoraTrfConfig):
    """Linear with LoRATRF."""

    supported_layers = (nn.Linear,)

    def init_tensors(self, config: LoraTrfConfig, r: int) -> dict[str, torch.Tensor]:
        down = torch.empty(r, self.fan_in)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        tensors = {"down": down, "up": torch.zeros(self.fan_out, r)}
        if config.filter == "cosine":
            filter_down = torch.empty(config.filter_r, self.fan_out)
            nn.init.kaiming_uniform_(filter_down, a=math.sqrt(5))
            tensors |= {"filter_down": filter_down, "filter_up": torch.zeros(self.fan_out, config.filter_r)}
            tensors["task"] = torch.randn(self.fan_out)
        elif config.filter == "code":
            tensors["gate"] = torch.zeros(r, r)
        elif config.filter == "edit":
            tensors |= {"scale": torch.zeros(self.fan_out), "shift": torch.zeros(self.fan_out)}
        else:
            read = torch.empty(config.filter_r, self.fan_out)
            nn.init.orthogonal_(read)
            tensors |= {"read": read, "write": read.clone(), "shift": torch.zeros(config.filter_r)}
        return tensors

    def calibrate(self, adapter: str, mean: torch.Tensor) -> None:
        """Sets the task vector to the mean output (out,) of a batch, when the config asks for it."""
        config = self.settings[adapter]
        if config.filter == "cosine" and config.task == "calibrated":
            task = self.tensors(adapter)["task"]
            task.data.copy_(mean)

    def is_linear(self, adapter: str) -> bool:
        return self.settings[adapter].filter in ("edit", "subspace")

    def input_projection(self, adapter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return tensors["down"]

    def nonlinear_delta(
        self, adapter: str, tensors: dict[str, torch.Tensor], projected: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.settings[adapter]
        t = {key: value.to(x.dtype) for key, value in tensors.items()}
        if config.filter == "code":
            return torch.sigmoid(F.linear(projected, t["gate"])) * projected, t["up"]
        g, filtered = gate_and_filter(y, tensors["task"], t["filter_down"])
        passed = self.filter_factor(adapter) * g.to(filtered.dtype) * filtered
        # One product for both parts.
        return torch.cat((projected, passed.to(projected.dtype)), -1), torch.cat((t["up"], t["filter_up"]), 1)

    def filter_factor(self, adapter: str) -> float:
        """Factor of the filter's part, free of the alpha / r that the whole effect is multiplied by."""
        return self.settings[adapter].filter_scale / self.initial_scaling(adapter)

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        kind, share, bias = self.settings[adapter].filter, self.filter_factor(adapter), self.base_bias()
        plain = Change(down=tensors["down"], up=tensors["up"])
        if kind == "edit":
            shift = tensors["shift"] if bias is None else tensors["shift"] + tensors["scale"] * bias
            return plain + Change(rows=tensors["scale"], bias=shift).scale(share)
        if kind == "subspace":
            difference = tensors["write"] - tensors["read"]
            shift = tensors["shift"] if bias is None else tensors["shift"] + difference @ bias.to(difference.dtype)
            down = difference @ self.base_weight().to(difference.dtype)
            return plain + Change(down=down, up=tensors["read"].t(), bias=tensors["read"].t() @ shift).scale(share)
        raise NotLinearError(
            f"LoRATRF with filter='{kind}' cannot be merged or folded exactly: its gate depends on the token. "
            "Keep it as an adapter, export an approximation, or train with filter='edit' or 'subspace'."
        )


def gate_and_filter(
    h: torch.Tensor, task: torch.Tensor, filter_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of each token h (..., d) that points along the task vector (d,), (..., 1), in fp32 or finer; and filter_down @ h."""
    task = task.to(torch.promote_types(task.dtype, torch.float32))
    along, norm, filtered = GateProducts.apply(h.reshape(-1, h.shape[-1]), task, filter_down.to(h.dtype))
    gate = (along / (norm * task.norm()).clamp(min=1e-8)).clamp(0, 1)
    return gate.view(*h.shape[:-1], 1), filtered.view(*h.shape[:-1], -1)


class GateProducts(torch.autograd.Function):
    """h (N, d) along a task vector (d,), its norm, both (N,) in the task's dtype, and h @ filter_down.T (N, k).

    Taken together since they share h: its gradient is one product and one sum in place.
    """

    @staticmethod
    def forward(h, task, filter_down):
        fine = h.to(task.dtype)
        return fine @ task, fine.norm(dim=-1), F.linear(h, filter_down)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dalong, dnorm, dfiltered):
        h, task, filter_down, norm = ctx.saved_tensors
        both = torch.cat((dfiltered, dalong[:, None].to(h.dtype)), 1)
        dh = both @ torch.cat((filter_down, task[None].to(h.dtype)))
        dh.addcmul_(h, (dnorm / norm.clamp(min=1e-8))[:, None].to(h.dtype))
        return dh, (dalong.to(h.dtype) @ h).to(task.dtype), dfiltered.t() @ h
