"""Any trained adapter, a folder of ours or a file of anybody's, as the changes it makes to a model's layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.processing_utils import ProcessorMixin

from ..adapters.attach import remove_adapters
from ..adapters.change import Change
from ..adapters.fold import Folded, fold
from ..core.errors import UserError
from ..core.run_folder import Run
from ..diffusion.textual_inversion import load_token_embeddings
from . import native
from .peft_folder import is_peft_folder, load_peft_folder, peft_folder_facts
from .read import layer_change, locate_layers, match_pipeline, read_lora


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter."""

    name: str
    hash: str
    """Of its files' content."""
    parts: dict[str, Folded]
    """Part of the pipeline -> layer -> change at strength 1."""
    facts: dict[str, str] = field(default_factory=dict)
    """What it says of itself: base, token, class_noun, ..."""
    token_embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    """The words it brings, see models/new_words.py."""


def adapter_path(path: Path) -> Path:
    """The adapter behind a path: that of a run folder, or the path itself.

    Raises:
        UserError: when there is nothing, or the run is not done.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, an adapter folder or a LoRA file.")
    run = Run(path)
    return run.finished_adapter() if run.config_file.is_file() else path


def adapter_facts(path: Path) -> dict[str, str]:
    """What an adapter says of itself, {} when it says nothing."""
    if is_native(path):
        file = path / "rankfold.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if is_peft_folder(path):
        return peft_folder_facts(path)
    return read_lora(path).header


def is_native(path: Path) -> bool:
    """Whether this is an adapter folder of ours."""
    return any((path / part / native.WEIGHTS).is_file() for part in native.PARTS)


def load_source(path: Path, model: Any, name: str = "") -> AdapterSource:
    """Reads the adapter of a run folder, an adapter folder or a LoRA file for a model with the attributes native.PARTS.

    The model is left as it was.

    Raises:
        UserError: when there is no adapter, it was made for another base, or it has no exact change (not linear).
    """
    place = adapter_path(path)
    if is_native(place):
        carrying = {part: native.require_part(model, part, place) for part in native.check_adapter_folder(place)}
        parts = carried_changes(place, carrying, lambda: native.load_layers(model, place, "source"))
    elif is_peft_folder(place) and isinstance(getattr(model, "processor", None), ProcessorMixin):
        parts = carried_changes(place, {"model": model.model}, lambda: load_peft_folder(model.model, place, "source"))
    else:
        parts = file_changes(place, model)
    return AdapterSource(
        name or path.stem, content_hash(place), parts, adapter_facts(place), load_token_embeddings(place)
    )


def carried_changes(folder: Path, carrying: dict[str, Any], load: Callable[[], None]) -> dict[str, Folded]:
    """The changes of an adapter folder; its layers are put on the model by `load`, and taken off again. carrying: parts of the model."""
    for part, module in carrying.items():
        if any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
            raise ValueError(f"{part} carries adapters already.")
    try:
        load()
        if any(isinstance(m, AuxiliaryTrainingWrapper) for module in carrying.values() for m in module.modules()):
            raise UserError(
                "it brings a projector trained in full, which is not a low-rank change and cannot be summed."
            )
        return {part: fold(module, "source") for part, module in carrying.items()}
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    finally:
        for module in carrying.values():
            remove_adapters(module)


def file_changes(path: Path, model: Any) -> dict[str, Folded]:
    """The changes of a LoRA file."""
    file = match_pipeline(read_lora(path), model)
    places = locate_layers(file, model)
    if not places:
        raise UserError(f"{path} was made for another base model: none of its layers is in this one.")
    parts: dict[str, Folded] = {}
    for layer, (part, name, module) in places.items():
        weight: Any = module.weight
        change = layer_change(file, layer, weight.detach().float().flatten(1).cpu())
        if not fits_weight(change, weight.flatten(1)):
            raise UserError(f"{path} was made for another base model: {name} has the shape {tuple(weight.shape)} here.")
        parts.setdefault(part, {})[name] = change
    return parts


def fits_weight(change: Change, weight: torch.Tensor) -> bool:
    """Whether a change is one of a weight (out, in)."""
    out, fan_in = weight.shape
    wanted = {"down": (None, fan_in), "up": (out, None), "dense": (out, fan_in), "bias": (out,)}
    for key, shape in wanted.items():
        tensor = getattr(change, key)
        if tensor is None:
            continue
        if tensor.dim() != len(shape):
            return False
        if any(want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)):
            return False
    return True


def content_hash(path: Path) -> str:
    """Hash of the adapter at an `adapter_path`.

    Raises:
        UserError: when there is none.
    """
    if is_native(path):
        return native.adapter_hash(path)
    return hashlib.sha256(read_lora(path).path.read_bytes()).hexdigest()[:16]
