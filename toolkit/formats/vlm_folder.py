"""PEFT folders of other trainers, put on a vision-language model: one adapter_config.json and its tensors, whatever named the layers.

Older releases of transformers and other trainers call a model's parts by other names. Each tensor finds its layer here, or the folder
is refused: none is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ..adapters.plugin import pattern_value
from ..core.errors import UserError
from . import native
from .peft_folder import read_peft_folder

LORA = re.compile(
    r"^(?P<layer>.+)\.(?P<tensor>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.[A-Za-z_]+)?)$"
)
RENAMED = (  # how a name may begin -> how it begins now
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("language_model.", "model.language_model."),
    ("model.language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens", "model.language_model.embed_tokens"),
    ("model.text_model.model.", "model.text_model."),
    ("text_model.", "model.text_model."),
    ("vision_model.", "model.vision_model."),
    ("connector.", "model.connector."),
)
WITHIN = ((".vision_model.encoder.", ".encoder."), (".encoder.", ".vision_model.encoder."), (".vision_model.", "."))


def load_peft_folder(model: nn.Module, folder: Path, adapter: str) -> None:
    """Puts the adapter of a PEFT folder on a model.

    Raises:
        UserError: when a tensor has no place in the model, or the folder cannot be read.
    """
    config, state = read_peft_folder(folder)
    config, state = fit_names(model, config, state, folder)
    native.put_on_model(model, config, state, adapter, folder)
    model.requires_grad_(False).eval()


def fit_names(
    model: nn.Module, config: Any, state: dict[str, torch.Tensor], folder: Path
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The config and the tensors by the names that the model's layers have.

    Raises:
        UserError: when a tensor has no place.
    """
    modules = {name for name, _ in model.named_modules() if name}
    parameters = {name for name, _ in model.named_parameters()}
    layers, full, renamed = {}, set(), {}
    for key, value in state.items():
        match = LORA.match(key)
        place = fit_name(match["layer"], modules) if match else fit_name(key, parameters)
        if place is None and match is None and (place := fit_other(key, modules)) is not None:
            renamed[place] = value  # a tensor of another method
            continue
        if place is None:
            raise UserError(
                f"The adapter {folder} does not fit this base model: it has no place for {key}, and none of its tensors is left out."
            )
        if match:
            layers[match["layer"]] = place
            renamed[f"{place}.{match['tensor']}"] = value
        else:
            full.add(place.rpartition(".")[0])
            renamed[place] = value
    if layers:
        fit_lora_config(config, layers, renamed)
    if full:
        config.modules_to_save = sorted(full)
    elif getattr(config, "modules_to_save", None):
        raise UserError(
            f"The adapter {folder} says that it brings {', '.join(config.modules_to_save)} in full, and it does not."
        )
    return config, renamed


def fit_name(name: str, known: Collection[str]) -> str | None:
    """What a layer is called now; None when there is none of that name."""
    tried = [name, *(new + name.removeprefix(old) for old, new in RENAMED if name.startswith(old))]
    for one in list(tried):
        tried += [one.replace(old, new, 1) for old, new in WITHIN if old in one]
    return next((one for one in tried if one in known), None)


def fit_other(key: str, modules: Collection[str]) -> str | None:
    """The name of a tensor of another method than LoRA: its layer's, and what follows."""
    words = key.split(".")
    for count in range(len(words) - 1, 1, -1):
        place = fit_name(".".join(words[:count]), modules)
        if place is not None and "_" in words[count]:
            return ".".join([place, *words[count:]])
    return None


def fit_lora_config(config: Any, layers: dict[str, str], state: dict[str, torch.Tensor]) -> None:
    """Names the layers in full in a LoRA's config, each with its rank and alpha. layers: name in the file -> name now."""
    ranks, alphas = {}, {}
    for old, new in layers.items():
        down = state.get(f"{new}.lora_A.weight", state.get(f"{new}.lora_embedding_A"))
        if down is None:
            continue
        ranks[new] = down.shape[0]
        alphas[new] = pattern_value(config.alpha_pattern or {}, old, config.lora_alpha)
    if not ranks:
        return
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {
        f"^{re.escape(name)}$": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }
    config.target_modules = set(layers.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
