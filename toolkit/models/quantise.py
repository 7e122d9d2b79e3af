"""Frozen linear layers in 4 or 8 bit (bitsandbytes), so that a large base fits beside its adapter (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from ..adapters.attach import replace_module
from ..errors import UserError


def check_quantize(kind: str) -> None:
    """Raises UserError when the library behind a number format is not installed."""
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f'--quantize {kind} needs the library bitsandbytes, which is not installed: pip install "rankfold[quantize]"'
        )


def quantise(model: nn.Module, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    """Puts the linear layers of a model's repeated blocks into nf4 or int8; what stands alone (embeddings, last layer) stays.

    Any device. The model is loaded as it is first, so main memory has to hold it.
    """
    import bitsandbytes as bnb

    inside = [
        (n, m) for n, m in model.named_modules() if type(m) is nn.Linear and any(w.isdigit() for w in n.split("."))
    ]
    for name, layer in inside:
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        new: Any
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        replace_module(model, name, new.requires_grad_(False))
    return model
