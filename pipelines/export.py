"""Export, proven: an adapter leaves as plain LoRA, is loaded back by the stock loader, and is compared."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..toolkit.adapters import files
from ..toolkit.adapters.files import Factors
from ..toolkit.adapters.fold import delta_weights
from .generate import Recipe, denoise, load_pipeline

ADAPTER = "adapter_0"


@dataclass(frozen=True)
class Proof:
    """What the reloaded file differs in from the adapter it was made of."""

    path: Path
    weight_error: float
    """Largest difference of a weight change, over all layers."""
    picture_difference: float
    """Largest difference of a pixel, 0..1, between pictures made from the same noise."""
    effect: float
    """Largest difference of a pixel that the adapter makes to the base model, for scale."""
    layers: int


def export_adapter(folder: Path, base: str, format: str, out: Path, *, prompt: str = "a sks creature") -> Proof:
    """Writes the adapter of `folder` as plain LoRA in `format` and proves the file through the reader's own loader.

    Raises:
        UserError: for an unknown format, a missing adapter, or an adapter that no plain LoRA equals.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = json.loads((folder / "rankfold.json").read_text()) if (folder / "rankfold.json").is_file() else {}
    live = load_pipeline(Recipe(prompt=prompt, base=base, adapters=(str(folder),), strengths=(1.0,)))
    parts = files.fold_pipeline(live, ADAPTER)
    path = files.export(parts, format, out, facts)
    fresh = load_pipeline(Recipe(prompt=prompt, base=base))
    plain, tuned = picture(fresh, prompt), picture(live, prompt)
    name = reload(fresh, path, format)
    error, layers = weight_error(fresh, parts, name)
    difference = float(np.abs(tuned - picture(fresh, prompt)).max())
    return Proof(path, error, difference, float(np.abs(tuned - plain).max()), layers)


def reload(pipe: Any, path: Path, format: str) -> str:
    """Loads an exported file as its readers would; returns the adapter's name there."""
    if format == "peft":
        for part in files.check_adapter_folder(path):
            wrapped = PeftModel.from_pretrained(getattr(pipe, part), str(path / part))
            setattr(pipe, part, wrapped.base_model.model)
        return "default"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="loaded")
    return "loaded"


def weight_error(pipe: Any, parts: dict[str, Factors], adapter: str) -> tuple[float, int]:
    """Largest difference between the weight changes of the reloaded adapter and the folded ones, and the layer count."""
    worst, layers = 0.0, 0
    for part, factors in parts.items():
        loaded = delta_weights(getattr(pipe, part), adapter)
        for name, (down, up) in factors.items():
            if name not in loaded:
                return float("inf"), layers
            change = up.flatten(1) @ down.flatten(1)
            worst = max(worst, float((change - loaded[name]).abs().max()))
            layers += 1
    return worst, layers


@torch.no_grad()
def picture(pipe: Any, prompt: str) -> np.ndarray:
    """One picture, (1, H, W, 3) in 0..1, without rounding to bytes."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return denoise(pipe, [prompt], seeds=[0], steps=8, guidance_scale=4.0, side=side, output_type="np")
