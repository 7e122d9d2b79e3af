"""Adapter files: the native PEFT folder a run keeps, and plain LoRA for diffusers, kohya tools and stock PEFT.

In every exported format alpha is baked into the up factor and written as alpha = rank, so that each reader's own
convention gives scale 1.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save
from torch import nn

from ..errors import UserError
from ..runs import write_atomic, write_text
from . import registry  # noqa: F401  (makes our variants known to PEFT before a config is read)
from .attach import adapter_state, load_adapter_state
from .fold import fold, lora_factors

PARTS = ("unet", "text_encoder")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer name -> down, up in the shapes of LoRA files
WEIGHTS = "adapter_model.safetensors"
FORMATS = ("diffusers", "kohya", "peft")


# ---------------------------------------------------------------------------------------------- native


def save_native(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, adapter_state(model, adapter), model.peft_config[adapter])  # type: ignore[index, union-attr]


def write_state(folder: Path, state: dict[str, torch.Tensor], config: PeftConfig) -> None:
    """Writes tensors and config as PEFT lays them out."""
    state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    values = config.to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    write_text(folder / "adapter_config.json", json.dumps(plain, indent=2, sort_keys=True, default=str))


def check_adapter_folder(folder: Path) -> list[str]:
    """The parts an adapter folder holds.

    Raises:
        UserError: when it holds none.
    """
    parts = [part for part in PARTS if (folder / part / WEIGHTS).is_file()]
    if not parts:
        raise UserError(f"{folder} holds no adapter: expected {folder / 'unet' / WEIGHTS}. Has the run finished?")
    return parts


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter folder's weights and configs."""
    digest = hashlib.sha256()
    for part in check_adapter_folder(folder):
        for name in ("adapter_config.json", WEIGHTS):
            digest.update((folder / part / name).read_bytes())
    return digest.hexdigest()[:16]


def load_into_pipeline(pipe: Any, folder: Path, adapter: str) -> None:
    """Puts a native adapter on a stock pipeline.

    Raises:
        UserError: when it was made for another base.
    """
    for part in check_adapter_folder(folder):
        model = getattr(pipe, part)
        config = PeftConfig.from_pretrained(str(folder / part))
        state = load_file(folder / part / WEIGHTS)
        try:
            model.add_adapter(config, adapter)
        except ValueError as error:
            raise UserError(f"The adapter {folder} does not fit this base model: {error}") from error
        load_adapter_state(model, state, adapter)
        model.requires_grad_(False).eval()


def set_strengths(pipe: Any, strengths: dict[str, float]) -> None:
    """Activates the named adapters at their strengths, on every part that carries them."""
    if not strengths:
        return
    for part in PARTS:
        model = getattr(pipe, part, None)
        here = [name for name in strengths if name in getattr(model, "peft_config", {})]
        if not here:
            continue
        model.set_adapter(here)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                for name in here:
                    module.set_scale(name, strengths[name])
    for part in PARTS:
        getattr(pipe, part).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- export


def fold_pipeline(pipe: Any, adapter: str) -> dict[str, Factors]:
    """Plain LoRA factors of every part that carries the adapter, as trained (strength 1)."""
    return {
        part: lora_factors(getattr(pipe, part), fold(getattr(pipe, part), adapter))
        for part in PARTS
        if adapter in getattr(getattr(pipe, part), "peft_config", {})
    }


def plain_config(factors: Factors) -> LoraConfig:
    """The LoraConfig of folded factors: alpha = rank everywhere, layers by their full names."""
    ranks = {name: down.shape[0] for name, (down, _) in factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common, lora_alpha=common, target_modules=list(ranks), rank_pattern=other, alpha_pattern=dict(other)
    )


def plain_state(factors: Factors) -> dict[str, torch.Tensor]:
    """Tensors named as PEFT names them."""
    state = {}
    for name, (down, up) in factors.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
    return state


def export(parts: dict[str, Factors], format: str, out: Path, facts: dict[str, str]) -> Path:
    """Writes folded factors in one of FORMATS; returns the file (diffusers, kohya) or the folder (peft).

    Raises:
        UserError: for an unknown format.
    """
    if format == "diffusers":
        return export_diffusers(parts, out)
    if format == "kohya":
        return export_kohya(parts, out, facts)
    if format == "peft":
        for part, factors in parts.items():
            (out / "peft" / part).mkdir(parents=True, exist_ok=True)
            write_state(out / "peft" / part, plain_state(factors), plain_config(factors))
        return out / "peft"
    raise UserError(f"--format {format} is unknown; choose one of {', '.join(FORMATS)}.")


def export_diffusers(parts: dict[str, Factors], out: Path) -> Path:
    """One file for `pipe.load_lora_weights`, with the adapter metadata of every part in its header."""
    state: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, factors in parts.items():
        state |= {f"{part}.{key}": value for key, value in plain_state(factors).items()}
        config = plain_config(factors).to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        metadata |= {f"{part}.{key}": value for key, value in plain.items()}
    path = out / "pytorch_lora_weights.safetensors"
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True, default=str)}
    write_atomic(path, save(state, metadata=header))
    return path


def export_kohya(parts: dict[str, Factors], out: Path, facts: dict[str, str]) -> Path:
    """One file named as kohya's tools, A1111 and ComfyUI name Stable Diffusion layers."""
    state: dict[str, torch.Tensor] = {}
    for part, factors in parts.items():
        for name, (down, up) in factors.items():
            if part == "text_encoder":
                name = name if name.startswith("text_model.") else f"text_model.{name}"
            key = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down, up
            state[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    ranks = {down.shape[0] for factors in parts.values() for down, _ in factors.values()}
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(ranks)),
        "ss_training_comment": "made with rankfold",
        "modelspec.trigger_phrase": facts.get("token", ""),
    }
    path = out / "kohya.safetensors"
    write_atomic(path, save(state, metadata=header))
    return path
