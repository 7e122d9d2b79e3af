"""Frozen linear layers in 4 or 8 bit, so that a large base fits beside its adapter (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import devices
from .errors import UserError
from .modules import replace_module

LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "fp8": "torchao"}


def check_quantize(kind: str) -> None:
    """Raises UserError when the library behind a dtype is not installed, or cannot do it on this device."""
    library = LIBRARIES.get(kind)
    if library and importlib.util.find_spec(library) is None:
        raise UserError(
            f'--quantize {kind} needs the library {library}, which is not installed: pip install "rankfold[quantize]"'
        )
    if library:
        devices.raise_fault(f"--quantize {kind}", devices.quantize_fault(devices.this_machine(), kind))


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of repeated blocks, by name: what is put into fewer bits; what stands alone (embeddings, last layer) stays."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and any(w.isdigit() for w in n.split("."))}


def quantize_model(model: nn.Module, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    """Puts the linear layers of a model's repeated blocks into nf4 or int8 (bitsandbytes) or fp8 (torchao, one scale per row).

    Any device. The model is loaded as it is first, so main memory has to hold it.
    """
    make = {"nf4": to_nf4, "int8": to_int8, "fp8": to_fp8}[kind]
    for name, layer in block_linears(model).items():
        replace_module(model, name, make(layer, compute_dtype).requires_grad_(False))
    if kind == "fp8":
        model.hf_quantizer = fp8_quantizer(model)
    return model


def to_nf4(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """The layer in 4 bit."""
    import bitsandbytes as bnb

    new = convert_layer(layer, bnb.nn.Linear4bit, compute_dtype=compute_dtype, quant_type="nf4")
    new.support_avx512bf16_for_cpu = (
        False  # or a pass in eval mode repacks the weight, and no gradient comes through it again
    )
    return new


def to_int8(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """The layer in 8 bit."""
    import bitsandbytes as bnb

    return convert_layer(layer, bnb.nn.Linear8bitLt, has_fp16_weights=False)


def convert_layer(layer: nn.Linear, kind: Callable[..., Any], **options: Any) -> nn.Module:
    """A layer of another kind with the same weights."""
    new = kind(layer.in_features, layer.out_features, layer.bias is not None, **options)
    new.load_state_dict(layer.state_dict())
    return new


def move_model(model: nn.Module, device: torch.device) -> None:
    """Brings a model to a device. bitsandbytes leaves what a layer in 8 bit holds beside its weight where it was."""
    model.to(device)
    for weight in (getattr(module, "weight", None) for module in model.modules()):
        if getattr(weight, "CB", None) is not None:
            weight.CB, weight.SCB = weight.data, weight.SCB.to(device)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------- fp8


def to_fp8(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """The layer in 8 bit floating point (e4m3)."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    new = FrozenLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    quantize_(new, Float8WeightOnlyConfig())
    return new


def fp8_quantizer(model: nn.Module) -> Any:
    """What a model loaded in fp8 by its own library has: PEFT asks it how to quantise a merged weight again."""
    from torchao.quantization import Float8WeightOnlyConfig

    if type(model).__module__.startswith("transformers"):
        from transformers import TorchAoConfig
        from transformers.quantizers.auto import AutoHfQuantizer

        return AutoHfQuantizer.from_config(TorchAoConfig(Float8WeightOnlyConfig()))
    from diffusers import TorchAoConfig as ImagesConfig
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    return DiffusersAutoQuantizer.from_config(ImagesConfig(Float8WeightOnlyConfig()))


class FrozenLinear(nn.Linear):
    """A linear layer whose quantised weight gets no gradient.

    torchao multiplies with the dequantised weight, which autograd would keep for the backward pass of every layer, in the size
    that quantising was to save.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(input, self.weight, self.bias)


class FrozenProduct(torch.autograd.Function):
    """x (..., in) through a frozen weight (out, in) and bias; the backward pass dequantises the weight once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None, None
