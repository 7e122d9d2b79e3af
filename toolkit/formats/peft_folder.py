"""A folder as PEFT saves an adapter of any of its methods: PEFT itself puts it on the model, so its scales and patterns are PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from ..adapters.attach import remove_adapters
from ..adapters.fold import Folded, fold
from ..core.errors import UserError
from . import native
from .adapter_folder import CONFIG, PICKLE, WEIGHTS, load_weights
from .match import Match
from .read import LoraFile
from .scales import pattern
from .spellings import unwrap


def read_peft_folder(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of a PEFT folder, without what wrappers put into their names.

    Raises:
        UserError: when one of the two cannot be read.
    """
    config = native.open_config(folder)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern(getattr(config, name, None), f"{folder / CONFIG}: {name}")
    safe = (folder / WEIGHTS).is_file()
    state = load_weights(folder / WEIGHTS) if safe else load_pickle(folder / PICKLE)
    return config, {unwrap(name): tensor for name, tensor in state.items()}


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of torch.save; nothing else that is in it is run.

    Raises:
        UserError: when it cannot be read, or holds anything but tensors by name.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise whatever a damaged file leads them to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{file} must hold tensors by name, as PEFT saves them, and does not.")
    return state


def peft_changes(file: LoraFile, match: Match, model: Any) -> dict[str, Folded]:
    """The changes of the adapter in the folder of a file: it is put on the model and taken off again.

    Raises:
        UserError: when PEFT refuses it for this model.
    """
    (part, *more) = dict.fromkeys(place.part for place in match.places.values())
    if more:
        raise UserError(
            f"{file.path} holds layers of {part} and of {', '.join(more)}, which no single PEFT folder can."
        )
    module = getattr(model, part)
    if any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
        raise ValueError(f"{part} carries adapters already.")
    config, state = read_peft_folder(file.path.parent)
    try:
        native.put_on_model(module, config, state, "source", file.path)
        return {part: fold(module, "source")}
    finally:
        remove_adapters(module)
