"""Any trained adapter, a folder of ours, one of PEFT's or a file of anybody's, as the changes it makes to a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.processing_utils import ProcessorMixin

from ..adapters.attach import remove_adapters
from ..adapters.fold import Folded, fold
from ..core.change import Change
from ..core.errors import UserError
from ..core.finite import is_finite
from ..diffusion.textual_inversion import load_token_embeddings
from . import native, vlm_folder
from .adapter_facts import AdapterFacts
from .adapter_folder import check_adapter_folder, is_native, is_peft_folder
from .layer_changes import matched_changes, scale_notes, widen_dense
from .locate import adapter_facts, adapter_path, content_hash
from .match import match_pipeline
from .peft_folder import peft_changes
from .read import read_lora


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter."""

    name: str
    hash: str
    """Of its files' content."""
    parts: dict[str, Folded]
    """Part of the pipeline -> layer -> change at strength 1."""
    facts: AdapterFacts = field(default_factory=AdapterFacts)
    """What it says of itself."""
    token_embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    """The words it brings, see toolkit/diffusion/textual_inversion.py."""
    notes: tuple[str, ...] = ()
    """What of it is left out, in a sentence each."""


def load_source(path: Path, model: Any, name: str = "", *, ignore_unused: bool = False) -> AdapterSource:
    """Reads the adapter of a run folder, an adapter folder or a LoRA file for a model with the attributes PARTS.

    The model is left as it was.

    Raises:
        UserError: when there is no adapter, it was made for another base, it has no exact change (not linear), or a part of it has no
            place in the model and ignore_unused is not set.
    """
    place = adapter_path(path)
    facts = adapter_facts(place)
    if is_native(place):
        carrying = {part: native.require_part(model, part, place) for part in check_adapter_folder(place)}
        parts = carried_changes(place, carrying, lambda: native.load_layers(model, place, "source"))
        source = AdapterSource("", "", parts, facts, load_token_embeddings(place))
    elif is_peft_folder(place) and isinstance(getattr(model, "processor", None), ProcessorMixin):
        load = lambda: vlm_folder.load_peft_folder(model.model, place, "source")  # noqa: E731
        source = AdapterSource("", "", carried_changes(place, {"model": model.model}, load), facts)
    else:
        source = file_source(place, model, ignore_unused=ignore_unused)
    return replace(source, name=name or path.stem, hash=content_hash(place), facts=facts)


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


def file_source(
    path: Path, model: Any, *, ignore_unused: bool = False, hold: Callable[[Change], Change] = widen_dense
) -> AdapterSource:
    """A LoRA file, or a folder as PEFT saves it, for a model that carries no adapters; without name, hash and facts.

    hold: see `matched_changes`.
    """
    file = read_lora(path)
    match = match_pipeline(file, model, ignore_unused=ignore_unused)
    if file.format == "peft" and is_peft_folder(file.path.parent):
        parts = peft_changes(file, match, model)
        return AdapterSource("", "", parts, notes=tuple(match.notes(file)))
    parts = {}
    for part, name, change in matched_changes(file, match, model, hold):
        parts.setdefault(part, {})[name] = change
    if not parts:
        raise UserError(
            f"{path} changes no layer: it brings words alone, which load_textual_inversion reads as files of their own."
        )
    words = {key: file.tensors.load(name).float() for key, name in match.words.items()}
    for key, vectors in words.items():
        if not is_finite(vectors):
            raise UserError(f"{path}: the word {key.partition('.')[2]} holds NaN or infinity: the file is corrupted.")
    return AdapterSource("", "", parts, token_embeddings=words, notes=tuple(match.notes(file) + scale_notes(file)))
