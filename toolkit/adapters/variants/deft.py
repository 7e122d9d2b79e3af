"""DEFT: what a low-rank subspace of the outputs held is taken out, and something learned put in (Kumar et al. 2025, arXiv 2509.22793).

    W' = (I - P Q') W + P R          up P (out, r), down R (r, in); Q = relu(P) in the form "relu"

so the change is P (R - Q' W): plain LoRA of the same rank, exactly, once W is known. In the form "qr" P and Q are the orthonormal
columns of a QR decomposition of `up`, and P P' is a projection. R starts as Q' W, and nothing is changed.

Use it where you would use LoRA: as many parameters, same file, a step a little slower. The formulas are those of PEFT's own DEFT, which
follows the released code; this one has convolutions and quantised bases beside, and exports as plain LoRA. Deviation: alpha / r multiplies
the whole change, as in every adapter here, where PEFT's multiplies R alone; with alpha = r, the default, they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer

FORMS = ("relu", "qr")


@dataclass
class DeftConfig(AdapterConfig):
    """Config of DEFT; registered in PEFT as RANKFOLD_DEFT, beside PEFT's own DEFT."""

    uses_base_weight: ClassVar[bool] = True

    form: str = field(
        default="relu",
        metadata={"help": "What is taken out: relu (P relu(P)', the released default) or qr (a projection)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("form", FORMS)


class DeftLayer(AdapterLayer, name="deft", config=DeftConfig, kind="RANKFOLD_DEFT"):
    """A linear layer or a convolution with DEFT."""

    def init_tensors(self, config: DeftConfig, r: int) -> dict[str, torch.Tensor]:
        r = min(r, self.fan_out)  # there are no more directions than outputs
        up, weight = torch.empty(self.fan_out, r), self.base_weight()
        nn.init.normal_(up, std=0.02)
        if not config.init_weights:
            return {"up": up, "down": 0.02 * torch.randn(r, self.fan_in)}
        if up.is_meta or weight.is_meta:
            return {"up": up, "down": up.new_empty(r, self.fan_in)}
        up = up.to(weight.device)
        return {"up": up, "down": ProjectedWeight.apply(put_in_and_taken_out(up, config.form)[1], weight)}

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        put_in, taken_out = put_in_and_taken_out(tensors["up"], self.settings[adapter].form)
        return Change(down=tensors["down"] - ProjectedWeight.apply(taken_out, self.base_weight()), up=put_in)


def put_in_and_taken_out(up: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions (out, k) that R is written along, and those along which W is read before it is taken out."""
    if form == "relu":
        return up, up.relu()
    basis = torch.linalg.qr(up.float()).Q.to(up.dtype)
    return basis, basis


class ProjectedWeight(torch.autograd.Function):
    """directions.T @ weight, (k, in), of directions (out, k) and a frozen weight (out, in) of any dtype.

    In the directions' own precision under autocast, too, since it is a small difference that counts; and the backward pass reads the weight
    again instead of keeping a finer copy of it.
    """

    @staticmethod
    def forward(directions, weight):
        with torch.autocast(directions.device.type, enabled=False):
            return directions.t() @ weight.to(directions.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dprojected):
        (weight,) = ctx.saved_tensors
        return weight.to(dprojected.dtype) @ dprojected.t(), None
