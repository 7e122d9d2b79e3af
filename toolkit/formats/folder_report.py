"""What an adapter folder of ours is, as report.py says it of files: its kind may have tensors that no LoRA reader knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .adapter_folder import CONFIG, PARTS, WEIGHTS, adapter_hash, is_native, load_weights, read_config
from .locate import adapter_facts, adapter_path
from .report import LayerReport, Report, advice_on_layers, inspect_lora

LOADERS = {
    "rankfold": "yes",
    "other tools": "no: write it out for them with rankfold export, or on the app's Library page",
}
CONFIG_FACTS = ("r", "lora_alpha", "target_modules")


def inspect_adapter(path: Path, model: Any = None) -> Report:
    """What a run's adapter, an adapter folder of ours or anybody's LoRA file is; with its base, changes are set against the weights.

    model: the base, a pipeline or a vision-language model.

    Raises:
        UserError: when it cannot be read, was made for another base, or has no exact change to set against the base's weights.
    """
    path = adapter_path(path)
    return inspect_folder(path, model) if is_native(path) else inspect_lora(path, model)


def is_chat_adapter(path: Path) -> bool:
    """Whether this is an adapter folder for a vision-language model."""
    return (path / "model" / WEIGHTS).is_file()


def inspect_folder(path: Path, model: Any = None) -> Report:
    """The same of an adapter folder of ours. Without its base it has no layers, for only with it is known what they change."""
    facts = adapter_facts(path)
    layers = list(layer_reports(path, model, facts.adapter)) if model is not None else []
    report = Report(path, "folder of rankfold", facts.base or "unknown", "in adapter_config.json", layers, LOADERS)
    report.facts = facts.to_header() | {"hash": adapter_hash(path)}
    report.advice = advice_on_layers(layers)
    for part in (part for part in PARTS if (path / part / WEIGHTS).is_file()):
        config, tensors = read_config(path / part / CONFIG), load_weights(path / part / WEIGHTS)
        numbers = sum(tensor.numel() for tensor in tensors.values())
        report.facts[f"in {part}"] = f"{len(tensors)} tensors, {numbers:,} numbers"
        report.facts |= {f"{part}: {key}": to_text(config[key]) for key in CONFIG_FACTS if key in config}
        if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
            report.advice.append(
                f"{part} holds NaN or infinity: it is corrupted; take an earlier checkpoint and train again."
            )
    return report


@torch.no_grad()
def layer_reports(path: Path, model: Any, method: str) -> Iterator[LayerReport]:
    """Every layer's change, set against the base's weight."""
    from .source import load_source

    for part, folded in load_source(path, model).parts.items():
        for name, change in folded.items():
            weight = getattr(model, part).get_submodule(name).weight.detach().float().flatten(1).cpu()
            norm = float(change.delta_weight(weight).norm())
            fault = "nothing" if norm == 0 and (change.bias is None or not change.bias.any()) else ""
            rank = len(change.down) if change.down is not None else None
            relative = norm / max(float(weight.norm()), 1e-30)
            yield LayerReport(f"{part}.{name}", method, rank, 1.0, norm=norm, relative=relative, fault=fault)


def to_text(value: Any) -> str:
    """A value of a config on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
