"""Any trained adapter, a folder of ours, one of PEFT's or a file of anybody's, as the changes it makes to a model's layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.processing_utils import ProcessorMixin

from ..adapters.attach import remove_adapters
from ..adapters.base import is_projection
from ..adapters.change import Change
from ..adapters.fold import Folded, fold
from ..core.errors import UserError
from ..core.paths import is_there
from ..core.run_folder import Run
from ..diffusion.textual_inversion import load_token_embeddings
from . import native, vlm_folder
from .adapter_facts import FILE, AdapterFacts, facts_of_header, read_facts
from .match import Match, Place, match_pipeline
from .methods import Frozen, MisfitError, layer_change
from .native import CONFIG
from .peft_folder import is_peft_folder, peft_changes
from .read import LoraFile, read_lora


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


def adapter_path(path: Path) -> Path:
    """The adapter behind a path: that of a run folder, or the path itself.

    Raises:
        UserError: when there is nothing, or the run is not done.
    """
    if not is_there(path):
        raise UserError(f"{path} does not exist: give a run folder, an adapter folder or a LoRA file.")
    run = Run(path)
    return run.finished_adapter() if run.config_file.is_file() else path


def adapter_facts(path: Path) -> AdapterFacts:
    """What an adapter says of itself: in rankfold.json of its folder, or in the header of its file.

    Raises:
        UserError: when what it says cannot be read.
    """
    if path.is_dir() and ((path / FILE).is_file() or is_native(path) or is_peft_folder(path)):
        return read_facts(path)
    return facts_of_header(read_lora(path).header)


def is_native(path: Path) -> bool:
    """Whether this is an adapter folder of ours."""
    return any((path / part / native.WEIGHTS).is_file() for part in native.PARTS)


def load_source(path: Path, model: Any, name: str = "", *, ignore_unused: bool = False) -> AdapterSource:
    """Reads the adapter of a run folder, an adapter folder or a LoRA file for a model with the attributes native.PARTS.

    The model is left as it was.

    Raises:
        UserError: when there is no adapter, it was made for another base, it has no exact change (not linear), or a part of it has no
            place in the model and ignore_unused is not set.
    """
    place = adapter_path(path)
    facts = adapter_facts(place)
    if is_native(place):
        carrying = {part: native.require_part(model, part, place) for part in native.check_adapter_folder(place)}
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


def file_source(path: Path, model: Any, *, ignore_unused: bool = False) -> AdapterSource:
    """A LoRA file, or a folder as PEFT saves it, for a model that carries no adapters; without name, hash and facts."""
    file = read_lora(path)
    match = match_pipeline(file, model, ignore_unused=ignore_unused)
    if file.format == "peft" and is_peft_folder(file.path.parent):
        parts = peft_changes(file, match, model)
        return AdapterSource("", "", parts, notes=tuple(match.notes(file)))
    parts = {}
    for part, name, change in matched_changes(file, match, model):
        parts.setdefault(part, {})[name] = change
    if not parts:
        raise UserError(
            f"{path} changes no layer: it brings words alone, which load_textual_inversion reads as files of their own."
        )
    words = {key: file.tensors.load(name).float() for key, name in match.words.items()}
    for key, vectors in words.items():
        if not torch.isfinite(vectors).all():
            raise UserError(f"{path}: the word {key.partition('.')[2]} holds NaN or infinity: the file is corrupted.")
    return AdapterSource("", "", parts, token_embeddings=words, notes=tuple(match.notes(file) + scale_notes(file)))


def scale_notes(file: LoraFile) -> list[str]:
    """What users must know of where the scale was found."""
    scales = file.scales
    silent = any("alpha" not in roles and file.rank(layer) for layer, roles in file.layers.items())
    if scales.header_alpha is None or scales.parts or not silent:
        return []
    return [
        f"{file.path.name}: alpha is said in the header alone ({scales.header_key} = {scales.header_alpha:g}) and is followed here; most "
        "other readers overlook it and take scale 1."
    ]


@torch.no_grad()
def matched_changes(file: LoraFile, match: Match, model: Any) -> Iterator[tuple[str, str, Change]]:
    """(part, layer, its change) of every layer that the file changes.

    Raises:
        UserError: for tensors that do not fit, are missing, or hold NaN or infinity; the sentence names the layer.
    """
    for layer, place in match.places.items():
        part = getattr(model, place.part)
        modules = [part.get_submodule(name) for name in place.layers]
        change = place_change(file, layer, place, modules)
        if (
            change.bias is not None
            and "diff_b" in file.layers[layer]
            and any(module.bias is None for module in modules)
        ):
            raise UserError(
                f"{file.path}: {layer} brings a bias (diff_b), and {place.layers[0]} has none in this base model; the file was made for "
                "another base, or by a tool that writes biases of nothing."
            )
        if change.bias is not None and not all(is_projection(module) or module.bias is not None for module in modules):
            raise UserError(f"{file.path}: {layer} brings a bias, and {place.layers[0]} has none in this base model.")
        rows = own_rows(change, place, modules)
        # Rows of nothing are a layer that was stacked with others and not trained.
        changing = [(name, own) for name, own in zip(place.layers, rows, strict=True) if changes_rows(own)]
        for name, own in changing or zip(place.layers, rows, strict=True):
            yield place.part, name, own


def place_change(file: LoraFile, layer: str, place: Place, modules: list[Any]) -> Change:
    """The change of the layers at a place, in the order of the file's rows."""
    if fault := file.fault(layer):
        raise UserError(f"{file.path}: {layer} {fault}.")
    frozen = frozen_weight(modules, swapped=place.swapped)
    scale = file.scale(layer, place.part, place.layers[0])
    try:
        change = layer_change(file.roles(layer), scale, frozen)
    except MisfitError as error:
        raise UserError(f"{file.path} was made for another base model: {place.layers[0]} {error} ({layer}).") from error
    except UserError as error:
        raise UserError(f"{file.path}: {layer} {error}.") from error
    return change


def own_rows(change: Change, place: Place, modules: list[Any]) -> list[Change]:
    """The change of a file's layer as those of the pipeline's layers at its place."""
    change = swap_rows(change) if place.swapped else change
    return split_change(change, [len(module.weight) for module in modules])


def frozen_weight(modules: list[Any], *, swapped: bool = False) -> Frozen:
    """The weights of layers that a file keeps as one, below each other in its rows."""
    first = tuple(modules[0].weight.shape)
    shape = (sum(len(module.weight) for module in modules), *first[1:])

    def load() -> torch.Tensor:
        weight = modules[0].weight if len(modules) == 1 else torch.cat([module.weight for module in modules])
        return swap_halves(weight) if swapped else weight

    return Frozen(shape, load)


ROWS = ("up", "rows", "mask_up", "bias", "dense")
"""Tensors of a change whose first dimension is the layer's outputs."""


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The two halves of the rows (out, ...), the other way round."""
    return torch.cat(tensor.chunk(2)[::-1])


def swap_rows(change: Change) -> Change:
    """The change with the two halves of its outputs the other way round."""
    return replace(change, **{name: swap_halves(t) for name in ROWS if (t := getattr(change, name)) is not None})


def split_change(change: Change, counts: list[int]) -> list[Change]:
    """The change cut into those of layers of so many outputs each; factors that a layer's rows do not use are left out."""
    rows = {name: tensor.split(counts) for name in ROWS if (tensor := getattr(change, name)) is not None}
    cut = [replace(change, **{name: parts[number] for name, parts in rows.items()}) for number in range(len(counts))]
    return [drop_unused_rank(one) for one in cut]


def changes_rows(change: Change) -> bool:
    """Whether any of its rows is more than nothing; asked of the factors, not of their product."""
    return any(bool(tensor.any()) for name in ROWS if (tensor := getattr(change, name)) is not None)


def drop_unused_rank(change: Change) -> Change:
    """The change without those of its rank whose up factors are all zero."""
    if change.up is None or change.down is None:
        return change
    used = change.up.any(0)
    if bool(used.all()):
        return replace(change, up=change.up.contiguous())
    used[0] |= not bool(used.any())
    return replace(change, up=change.up[:, used].contiguous(), down=change.down[used].contiguous())


def content_hash(path: Path) -> str:
    """Hash of the adapter at an `adapter_path`: of all that decides what it does.

    Raises:
        UserError: when there is none.
    """
    if is_native(path):
        return native.adapter_hash(path)
    file = read_lora(path).path
    digest = hashlib.sha256(file.read_bytes())
    if file.name == native.WEIGHTS and (file.parent / CONFIG).is_file():
        digest.update((file.parent / CONFIG).read_bytes())
    return digest.hexdigest()[:16]
