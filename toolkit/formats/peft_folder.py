"""A folder as PEFT saves an adapter of any of its methods: PEFT itself puts it on the model, so its scales and patterns are PEFT's own."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from ..adapters.attach import remove_adapters
from ..adapters.fold import Folded, fold
from ..core.errors import UserError
from . import native
from .match import Match
from .native import CONFIG
from .read import LoraFile
from .spellings import unwrap


def is_peft_folder(file: LoraFile) -> bool:
    """Whether a file has PEFT's config beside it."""
    return file.format == "peft" and (file.path.parent / CONFIG).is_file()


def peft_changes(file: LoraFile, match: Match, model: Any) -> dict[str, Folded]:
    """The changes of the adapter: it is put on the model and taken off again.

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
    tensors = {name: file.tensors.load(name) for name in file.tensors.infos}
    config = native.open_config(file.path.parent)
    try:
        native.put_on_model(module, config, {unwrap(name): t for name, t in tensors.items()}, "source", file.path)
        return {part: fold(module, "source")}
    finally:
        remove_adapters(module)
