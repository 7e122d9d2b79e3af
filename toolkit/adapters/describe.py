"""docs/adapters.md, made from the registry: `rankfold adapters --markdown > docs/adapters.md`."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..core.errors import UserError
from .attach import adapter_layers, trainable_parameters
from .base import REGISTRY, AdapterConfig, AdapterLayer
from .fold import fold
from .registry import BASELINES, SHARED_FIELDS, adapter_names, make_config

WIDTH, RANK = 320, 8
INTRO = f"""# Adapters

Made from the registry by `rankfold adapters --markdown`; a test keeps it true. Every adapter is chosen with `--adapter NAME`, its
own fields with `--adapter-options key=value ...`, or used through its config in stock PEFT. The figures are for one
Linear({WIDTH}, {WIDTH}) with a bias at rank {RANK} and default options; what a step costs is in [speed.md](speed.md) and
`benchmarks/adapters.py`.
"""
BASELINE_TEXTS = {
    "lora": "PEFT's own LoRA: the plain low-rank change that everything else is measured against.",
    "dora": "PEFT's own DoRA: LoRA with a learned length for each row of the weight; slower, merges, no exact plain LoRA.",
    "loha": "PEFT's own LoHa: the elementwise product of two low-rank changes.",
    "lokr": "PEFT's own LoKr: a Kronecker product; very few numbers.",
    "gralora": "PEFT's own GraLoRA: a low-rank change for each block of the weight, with as many numbers as LoRA of the same rank.",
    "peanut": "PEFT's own PEANuT: a small network of the frozen weight makes one of the two factors; no alpha, no dropout.",
    "oft": "PEFT's own OFT: rotates the weight's input in blocks; `--rank` is the block size.",
}


def adapters_markdown() -> str:
    """The whole page."""
    lines = [INTRO, "| adapter | trainable parameters | leaves as |", "|---|---:|---|"]
    for name in adapter_names():
        model = sample_model(name)
        count = sum(p.numel() for p in trainable_parameters(model))
        lines.append(f"| [{name}](#{name}) | {count:,} | {export_form(model)} |")
    for name in adapter_names():
        lines += ["", f"## {name}", "", variant_text(name), ""]
        if name in REGISTRY:
            lines += ["| field | default | meaning |", "|---|---|---|"]
            config = REGISTRY[name].config_class
            lines += [field_row(field) for field in fields(config) if field.name not in SHARED_FIELDS]
    lines += ["", "## Fields that all of ours share", "", "| field | default | meaning |", "|---|---|---|"]
    ours = {name for name in AdapterConfig.__annotations__ if name != "kind"}
    lines += [field_row(field) for field in fields(AdapterConfig) if field.name in ours]
    return "\n".join(lines) + "\n"


def variant_text(name: str) -> str:
    """The variant's own words: its module's text."""
    if name in BASELINES:
        return BASELINE_TEXTS[name]
    return (sys.modules[REGISTRY[name].__module__].__doc__ or "").strip()


def field_row(field: Any) -> str:
    """One field of a config as a row of a table."""
    default = field.default if field.default is not MISSING else field.default_factory()
    meaning = field.metadata.get("help", "").replace("|", "or")
    return f"| `{field.name}` | `{default}` | {meaning} |"


def sample_model(name: str) -> nn.Module:
    """A layer with the adapter on it, its tensors no longer at the start."""
    torch.manual_seed(0)
    options = {"rank": RANK, "alpha": float(RANK), "dropout": 0.0, "target_modules": ("0",)}
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), make_config(name, **options))
    for parameter in trainable_parameters(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def export_form(model: nn.Module) -> str:
    """How the adapter exports, tried out."""
    try:
        (change,) = fold(model).values()
    except UserError:
        return "native; plain LoRA only as an approximation"
    if not change.is_low_rank:
        return "`kohya-full`, exact; plain LoRA as an approximation"
    assert change.down is not None
    rank = "the same rank" if len(change.down) == RANK else f"rank {len(change.down)} for {RANK}"
    (layer,) = adapter_layers(model).values()
    bias = " and a change of the bias" if isinstance(layer, AdapterLayer) and change.bias is not None else ""
    return f"plain LoRA, exact, {rank}{bias}"
