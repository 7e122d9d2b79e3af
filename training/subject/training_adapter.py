"""The training adapter: a change of a distilled base that undoes the distillation, in its weights while it is trained on.

Trained without it, an adapter of a base that draws in few steps learns to undo those steps along with the subject. With it in the
weights there is nothing to undo; it is taken out wherever images are drawn, and is no part of what is saved.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ...toolkit.adapters.fold import Folded
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.formats.apply import add_to_weights
from ...toolkit.formats.locate import adapter_path, content_hash
from ...toolkit.formats.source import load_source
from .drawing_weights import DrawingWeights

FLAG = "--training-adapter"


def read_changes(path: Path, model: Any, denoiser: str) -> Folded:
    """The changes that the adapter at this path makes to a model's denoiser. model: has the parts as attributes, in full precision.

    Raises:
        UserError: for an adapter of another base, or one that changes anything else: that would have no effect.
    """
    try:
        with warnings.catch_warnings():  # of torch, where the model is shapes alone
            warnings.simplefilter("ignore")
            source = load_source(path, model)
    except UserError as error:
        raise UserError(f"{FLAG}: {error}") from error
    folded = source.parts.pop(denoiser, {})
    others = [*source.parts, *({"words"} if source.token_embeddings else ())]
    if others or not folded:
        raise UserError(
            f"{FLAG} {path} changes {', '.join(others) or 'nothing'}, and only changes of the {denoiser} are merged while training: "
            "take one that undoes the distillation, such as `rankfold train dedistill` makes."
        )
    for name, change in folded.items():
        layer: Any = getattr(model, denoiser).get_submodule(name)
        if change.bias is not None and layer.bias is None:
            raise UserError(f"{FLAG} {path} brings a bias for {name}, which has none in this base.")
    return folded


def describe_adapter(path: Path) -> str:
    """What an adapter that was trained with it says of it: its name and the hash of its content."""
    return f"{path.name} ({content_hash(adapter_path(path))})"


def merge_training_adapter(model: DiffusionModel, path: Path) -> DrawingWeights:
    """Puts the adapter into the weights of a model's denoiser; returns the layers as they were, for images to be drawn with.

    A quantised base is loaded once more, so that it is changed before it is rounded.

    Raises:
        UserError: as `read_changes` does.
    """
    name, plain, waiting = model.denoiser_name, model.denoiser, {}

    def merge(part: nn.Module) -> None:
        folded = read_changes(path, SimpleNamespace(**{name: part}), name)
        for layer in folded:
            whole = model.quantize == "none"
            waiting[layer] = copy.deepcopy(part.get_submodule(layer)).cpu() if whole else plain.get_submodule(layer)
        add_to_weights(part, folded)

    if model.quantize == "none":
        merge(plain)
    else:
        model.loaded[name] = model.load(name, before_quantizing=merge)
    return DrawingWeights(model.denoiser, waiting)
