"""The native form of an adapter, as a run keeps it: a PEFT folder for each part of the pipeline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save
from torch import nn

from ..adapters.attach import adapter_layers, adapter_state, add_adapter, load_adapter_state, set_active
from ..core.errors import UserError
from ..core.files import write_atomic, write_text
from ..diffusion import textual_inversion as new_words

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model")
WEIGHTS = "adapter_model.safetensors"


def save_native(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors."""
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
        raise UserError(
            f"{folder} holds no adapter: no folder such as unet/ or model/ with {WEIGHTS} is in it. Has the run finished?"
        )
    return parts


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter folder's weights and configs."""
    digest = hashlib.sha256()
    for part in check_adapter_folder(folder):
        for name in ("adapter_config.json", WEIGHTS):
            digest.update((folder / part / name).read_bytes())
    if (folder / new_words.FILE).is_file():
        digest.update((folder / new_words.FILE).read_bytes())
    return digest.hexdigest()[:16]


def load_into_pipeline(pipe: Any, folder: Path, adapter: str) -> None:
    """Puts a native adapter on a stock pipeline, with the words it brings.

    Raises:
        UserError: when it was made for another base, or a word is there already.
    """
    load_layers(pipe, folder, adapter)
    new_words.add_tokens_to_pipeline(pipe, new_words.load_token_embeddings(folder))


def load_layers(pipe: Any, folder: Path, adapter: str) -> None:
    """Puts the layers of a native adapter on anything that has a pipeline's parts as attributes.

    Raises:
        UserError: when it was made for another base.
    """
    for part in check_adapter_folder(folder):
        model = require_part(pipe, part, folder)
        config = PeftConfig.from_pretrained(str(folder / part))
        state = load_file(folder / part / WEIGHTS)
        try:
            add_adapter(model, config, adapter)
        except ValueError as error:
            raise UserError(f"The adapter {folder} does not fit this base model: {error}") from error
        load_adapter_state(model, state, adapter)
        model.requires_grad_(False).eval()


def require_part(pipe: Any, part: str, folder: Path) -> Any:
    """The part of a pipeline that an adapter's folder asks for.

    Raises:
        UserError: when the pipeline has none.
    """
    model = getattr(pipe, part, None)
    if model is None:
        raise UserError(f"The adapter {folder} was made for another base model: this one has no {part}.")
    return model


def set_strengths(pipe: Any, strengths: dict[str, float]) -> None:
    """Activates the named adapters at their strengths, on every part that carries them, and no others.

    Raises:
        UserError: for a strength other than 1 of an adapter that has none.
    """
    if not strengths:
        return
    for part in PARTS:
        model = getattr(pipe, part, None)
        known = getattr(model, "peft_config", {})
        here = [name for name in strengths if name in known]
        if not here:
            if known:
                set_active(model, [])  # or the ones that were active before would stay so
            continue
        check_single_full_module(model, here)
        set_active(model, here)
        for layer in adapter_layers(model).values():
            for name in here:
                set_strength(layer, name, strengths[name])
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                set_full_strength(module, {name: strengths[name] for name in here})
        model.requires_grad_(False)


@torch.no_grad()
def set_full_strength(module: ModulesToSaveWrapper, strengths: dict[str, float]) -> None:
    """Sets the strength of a module that was trained in full: so far on the way from the base's weights to its own."""
    for name, strength in strengths.items():
        trained: dict[str, torch.Tensor] = module.__dict__.setdefault("trained", {})
        for key, parameter in module.modules_to_save[name].named_parameters() if name in module.modules_to_save else ():
            goal = trained.setdefault(f"{name}.{key}", parameter.detach().clone())
            start = module.original_module.get_parameter(key).to(goal)
            parameter.copy_(goal if strength == 1 else torch.lerp(start, goal, strength))


def check_single_full_module(model: Any, names: list[str]) -> None:
    """Raises UserError when several adapters bring the same module, trained in full."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in names) > 1:
            raise UserError(
                "Several of the adapters bring a projector trained in full, and a model has only one: take one of them."
            )


def set_strength(layer: Any, adapter: str, strength: float) -> None:
    """Sets the strength of an adapter in one layer: 1 is as trained.

    Raises:
        UserError: when the adapter rotates (OFT) and so knows no strength but 1.
    """
    if hasattr(layer, "scaling"):
        layer.set_scale(adapter, strength)
    elif strength != 1:
        raise UserError(
            f"An OFT adapter rotates the weights, so it has no strength but 1, not {strength:g}: leave --strength out."
        )
