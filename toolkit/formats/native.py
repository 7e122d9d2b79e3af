"""The native form of an adapter, as a run keeps it: a PEFT folder for each part of the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save
from torch import nn

from ..adapters.attach import adapter_layers, adapter_state, add_adapter, load_adapter_state, set_active
from ..adapters.registry import trained_scaling
from ..core.errors import UserError
from ..core.files import write_atomic, write_text
from ..core.finite import is_finite
from ..diffusion import textual_inversion as new_words
from .adapter_folder import CONFIG, PARTS, WEIGHTS, check_adapter_folder, load_weights, read_config


def save_native(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors."""
    write_state(folder, adapter_state(model, adapter), model.peft_config[adapter])  # type: ignore[index, union-attr]


def write_state(folder: Path, state: dict[str, torch.Tensor], config: PeftConfig) -> None:
    """Writes tensors and config as PEFT lays them out."""
    state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    values = config.to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    write_text(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str))


def open_config(folder: Path) -> PeftConfig:
    """The config of a PEFT folder, of whichever method.

    Raises:
        UserError: when it cannot be read, or is of no method of the installed PEFT.
    """
    values = read_config(folder / CONFIG)
    if not isinstance(values.get("peft_type"), str):
        raise UserError(f"{folder / CONFIG} does not say of which method the adapter is (peft_type).")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT's own classes check a config's values, each in its own way
        raise UserError(
            f"{folder / CONFIG} is no config that PEFT can read: {' '.join(str(error).split())[:200]}"
        ) from error


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
        put_on_model(model, open_config(folder / part), load_weights(folder / part / WEIGHTS), adapter, folder)
        model.requires_grad_(False).eval()


def put_on_model(
    model: nn.Module, config: PeftConfig, state: dict[str, torch.Tensor], adapter: str, source: Path
) -> None:
    """Puts an adapter's layers and tensors on a model. source: as messages call it.

    Raises:
        UserError: when it was made for another base, its config asks for what this model does not have, or it holds NaN.
    """
    bad = [k for k, tensor in state.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if bad:
        raise UserError(
            f"The adapter {source} holds NaN or infinity in {bad[0]}: it is corrupted; take an earlier checkpoint."
        )
    try:
        add_adapter(model, config, adapter)
        load_adapter_state(model, state, adapter)
    except UserError:
        raise
    except Exception as error:  # a config can ask for anything, and PEFT finds it out where it may
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The adapter {source} does not fit this base model: {reason}") from error


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
                set_strength(layer, name, strengths[name], known[name])
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


def set_strength(layer: Any, adapter: str, strength: float, config: PeftConfig) -> None:
    """Sets the strength of an adapter in one layer: 1 is as trained. config: the adapter's.

    Raises:
        UserError: when the adapter rotates (OFT) and so knows no strength but 1.
    """
    if hasattr(layer, "scaling") and hasattr(layer, "set_scale"):
        layer.set_scale(adapter, strength)
    elif hasattr(layer, "scaling"):
        if adapter in layer.scaling:
            layer.scaling[adapter] = strength * trained_scaling(config)
    elif strength != 1:
        raise UserError(
            f"An OFT adapter rotates the weights, so it has no strength but 1, not {strength:g}: leave --strength out."
        )
