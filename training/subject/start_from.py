"""Training that goes on from another adapter: a run, an adapter folder, or a LoRA file of any tool.

Its layers, ranks and alphas are kept, so what is trained is that adapter and no other.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ...toolkit.adapters.attach import trainable_parameters
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.diffusion.textual_inversion import load_token_embeddings
from ...toolkit.formats import native
from ...toolkit.formats.adapter_folder import WEIGHTS, check_adapter_folder, is_native, is_peft_folder, load_weights
from ...toolkit.formats.layer_changes import matched_changes
from ...toolkit.formats.locate import adapter_path
from ...toolkit.formats.match import Match, match_pipeline
from ...toolkit.formats.peft_folder import read_peft_folder
from ...toolkit.formats.read import LoraFile, read_lora
from ...toolkit.formats.write import Part, peft_state
from ..config.subject import SubjectConfig

PartState = tuple[PeftConfig, dict[str, torch.Tensor]]


def attach_start(model: DiffusionModel, config: SubjectConfig) -> dict[str, nn.Module]:
    """Puts the adapter of config.start_from on a frozen model, to be trained; returns the parts that carry it.

    Raises:
        UserError: when it was made for another base, brings what cannot be trained further, or changes text encoders that are not to be
            trained.
    """
    assert config.start_from is not None
    parts: dict[str, nn.Module] = {}
    for name, (own, state) in read_parts(config.start_from, model).items():
        if name != model.denoiser_name and not config.train_text_encoder:
            raise UserError(f"--start-from {config.start_from} changes {name} too: give --train-text-encoder.")
        part = getattr(model, name)
        own.inference_mode = False
        part.requires_grad_(False)
        native.put_on_model(part, own, state, "default", config.start_from)
        for parameter in trainable_parameters(part):
            parameter.data = parameter.data.float()
        parts[name] = part
    return parts


def read_parts(path: Path, model: DiffusionModel) -> dict[str, PartState]:
    """The PEFT config and the tensors of each part of the model that the adapter changes."""
    place = adapter_path(path)
    if is_native(place):
        refuse_words(path, load_token_embeddings(place))
        folders = {part: place / part for part in check_adapter_folder(place)}
        return {part: (native.open_config(folder), load_weights(folder / WEIGHTS)) for part, folder in folders.items()}
    file = read_lora(place)
    match = match_pipeline(file, model)
    refuse_words(path, match.words)
    if is_peft_folder(place):
        (part,) = {place.part for place in match.places.values()}
        return {part: read_peft_folder(place)}
    return lora_parts(path, file, match, model)


def refuse_words(path: Path, words: Any) -> None:
    """Raises UserError for an adapter that brings words of its own."""
    if words:
        names = ", ".join(sorted({key.partition(".")[2] for key in words}))
        raise UserError(
            f"--start-from {path} brings words of its own ({names}), which cannot be trained further: take an adapter without, and "
            "give the subject a --token."
        )


def lora_parts(path: Path, file: LoraFile, match: Match, model: DiffusionModel) -> dict[str, PartState]:
    """The layers of a file as a LoRA that keeps the file's own ranks and alphas."""
    folded: dict[str, dict[str, Any]] = {}
    for part, name, change in matched_changes(file, match, model):
        if not change.is_low_rank:
            raise UserError(f"--start-from {path}: {part}.{name} is no plain LoRA, which alone can be trained further.")
        folded.setdefault(part, {})[name] = change
    scales = {
        (place.part, name): file.scale(layer, place.part, name) or 1.0
        for layer, place in match.places.items()
        for name in place.layers
    }
    found: dict[str, PartState] = {}
    for part, changes in folded.items():
        state, lora = peft_state(Part(getattr(model, part), changes, ""))
        alphas = {}
        for name in changes:
            scale = scales[part, name]
            for key in (f"{name}.lora_B.weight", f"{name}.lora_B.bias"):
                if key in state:
                    state[key] = state[key] / scale  # the change has it baked in
            alphas[name] = scale * len(state[f"{name}.lora_A.weight"])
        lora.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
        lora.alpha_pattern = {
            f"^{re.escape(name)}$": alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha
        }
        found[part] = lora, state
    return found
