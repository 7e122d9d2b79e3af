"""A file's layers found in a pipeline, and every tensor accounted for: used, named as left out, or the file is refused.

What is left out must change nothing (factors of zeros, an alpha alone) or be none of an adapter's tensors; anything else is refused,
unless the user says that it may be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.errors import UserError
from ..diffusion.families import family_of_denoiser
from .adapter_folder import PARTS
from .diagnose import describe_origin
from .methods import EXTRAS, method_of, unread_kinds
from .read import LoraFile
from .spellings import DENOISER, WORD_ENCODERS, layer_candidates

IGNORE = "--ignore-unused"


@dataclass(frozen=True)
class Place:
    """Where a file's layer is in a pipeline."""

    part: str
    layers: tuple[str, ...]
    """Names of the part's layers: several where the file keeps them as one, below each other in its rows."""
    swapped: bool = False
    """Whether the file has the two halves of the rows the other way round."""


@dataclass
class Match:
    """A file's layers in a pipeline."""

    places: dict[str, Place]
    """Layer of the file -> where it is."""
    words: dict[str, str] = field(default_factory=dict)
    """'text_encoder.WORD' -> the tensor's name."""
    missing: list[str] = field(default_factory=list)
    """Layers of the file that are not in the pipeline."""
    unused: list[str] = field(default_factory=list)
    """Names of tensors that would change something and have no place: those of missing layers, and words."""
    idle: list[str] = field(default_factory=list)
    """Names of tensors without a place that change nothing."""

    def notes(self, file: LoraFile) -> list[str]:
        """What is left out, in a sentence each."""
        found = []
        for names, why in ((self.unused, "have no place in this base model"), (self.idle, "change nothing here")):
            if names:
                found.append(f"{file.path.name}: {len(names)} of {len(file.tensors.infos)} tensors are left out, since they {why}, "
                             f"such as {names[0]}.")  # fmt: skip
        return found


class PipelineNames:
    """All names that files give to a pipeline's layers."""

    def __init__(self, pipe: Any) -> None:
        self.parts: dict[str, dict[str, Place]] = {}
        self.models: dict[str, nn.Module] = {}
        for part in PARTS:
            model = getattr(pipe, part, None)
            if isinstance(model, nn.Module):
                self.parts[part], self.models[part] = layer_names(part, model), model

    def denoisers(self) -> tuple[str, ...]:
        """The part that is the denoiser."""
        return tuple(part for part in ("unet", "transformer") if part in self.parts)

    def find(self, layer: str, order: Sequence[str] = ()) -> Place | None:
        """Where a file's layer is. order: parts to look in where the name tells none."""
        for parts, name in layer_candidates(layer):
            choice = self.denoisers() if parts == (DENOISER,) else parts or order or tuple(self.parts)
            if DENOISER in choice:
                choice = (*self.denoisers(), *(part for part in choice if part != DENOISER))
            for part in choice:
                if (place := self.parts.get(part, {}).get(name)) is not None:
                    return place
        return None


def layer_names(part: str, model: nn.Module) -> dict[str, Place]:
    """Every name of a part's layers, with . and with _ between modules -> where it is."""
    names: dict[str, Place] = {}

    def add(name: str, place: Place) -> None:
        names.setdefault(name, place)
        names.setdefault(name.replace(".", "_"), place)

    for name, module in model.named_modules():
        if not name or getattr(module, "weight", None) is None:
            continue
        place = Place(part, (name,))
        add(name, place)
        if part.startswith("text_encoder"):  # CLIP's text model has lost a level of names since
            add(f"text_model.{name}", place)
            add(name.removeprefix("text_model."), place)
    family = family_of_denoiser(model)
    for theirs, original in family.original_layers(model).items() if family else ():
        if all(getattr(model.get_submodule(name), "weight", None) is not None for name in original.layers):
            add(theirs, Place(part, original.layers, original.swapped))
    return names


def match_pipeline(file: LoraFile, pipe: Any, *, ignore_unused: bool = False) -> Match:
    """Finds all of a file's layers in a pipeline.

    Raises:
        UserError: when it was made for another base, a layer occurs twice, or something that has an effect has no place and
            ignore_unused is not set.
    """
    names = PipelineNames(pipe)
    order = part_order(file, names)
    match = Match({})
    for layer in file.layers:
        place = names.find(layer, order)
        if place is None:
            match.missing.append(layer)
        else:
            match.places[layer] = place
    check_once(file, match)
    account(file, match, pipe)
    if file.layers and not match.places:
        raise UserError(another_base(file, match, pipe))
    if match.unused and not ignore_unused:
        raise UserError(unused_sentence(file, match, pipe))
    return match


def part_order(file: LoraFile, names: PipelineNames) -> tuple[str, ...]:
    """The parts to look in for layers whose names tell none: the one that has them all.

    Raises:
        UserError: when several have them, as with two text encoders of one architecture.
    """
    bare = [layer for layer in file.layers if not any(parts for parts, _ in layer_candidates(layer))]
    if not bare:
        return ()
    if file.path.parent.name in names.parts:  # PEFT folders of a pipeline's parts, as they are exported
        return (file.path.parent.name,)
    fits = [part for part, known in names.parts.items() if all(has_layer(known, layer) for layer in bare)]
    if len(fits) > 1:
        fits = [part for part in fits if shapes_fit(file, bare, names, part)] or fits
    if len(fits) > 1:
        raise UserError(
            f"{file.path} does not say which part of the base it is for, and its layers, such as {bare[0]}, are in {' and '.join(fits)}: "
            f"put it into a folder of that name, {fits[0]}/{file.path.name}."
        )
    return tuple(fits)


def has_layer(known: dict[str, Place], layer: str) -> bool:
    """Whether a part has a layer, by any of its spellings."""
    return any(name in known for _, name in layer_candidates(layer))


def shapes_fit(file: LoraFile, layers: Iterable[str], names: PipelineNames, part: str) -> bool:
    """Whether LoRA factors of layers are of the widths that a part's layers have."""
    for layer in layers:
        place, infos = names.find(layer, (part,)), file.infos(layer)
        if place is None or place.part != part or not {"down", "up"} <= infos.keys():
            continue
        rows = sum(len(names.models[part].get_submodule(name).weight) for name in place.layers)  # type: ignore[arg-type]
        if infos["up"].shape[:1] != (rows,):
            return False
    return True


def check_once(file: LoraFile, match: Match) -> None:
    """Raises UserError when two of the file's layers are the same one of the pipeline."""
    owners: dict[tuple[str, str], str] = {}
    for layer, place in match.places.items():
        for name in place.layers:
            first = owners.setdefault((place.part, name), layer)
            if first != layer:
                raise UserError(
                    f"{file.path} changes {name} twice, as {first} and as {layer}: one of them is a copy under another name; "
                    "save the file without it."
                )


def account(file: LoraFile, match: Match, pipe: Any) -> None:
    """Sorts the tensors that no place has taken into those that would change something and those that do not."""
    layers = set(file.layers)
    for layer in match.missing:
        (match.unused if has_effect(file, layer) else match.idle).extend(file.layers[layer].values())
    for word, encoders in file.words.items():
        for encoder, name in encoders.items():
            key = WORD_ENCODERS.get(encoder, "")
            if key and word_fits(pipe, key, word, file.tensors.infos[name].shape):
                match.words[f"{key}.{word}"] = name
            else:
                match.unused.append(name)
    for name in file.unknown_names:
        beside = any(name.startswith(f"{name.split('.', 1)[0]}.") and name.rsplit(".", n)[0] in layers for n in (1, 2))
        (match.unused if beside or is_adapter_name(name) else match.idle).append(name)


def is_adapter_name(name: str) -> bool:
    """Whether a name is one that an adapter's tensor has, though of no kind that is known."""
    return bool(layer_candidates(name)[:-1]) or "lora" in name.lower()


def has_effect(file: LoraFile, layer: str) -> bool:
    """Whether a layer's tensors change anything wherever they are; those that are not understood count as if they did."""
    roles = file.layers[layer]
    if set(roles) <= {"alpha"}:
        return False
    try:
        method = method_of(roles)
    except UserError:
        return True
    if set(roles) & (set(EXTRAS) - {"alpha"}) or method.name not in ("lora", "full"):
        return True
    last = {"lora": "up", "full": "diff"}[method.name]
    return last not in roles or bool(file.tensors.load(roles[last]).float().any())


def word_fits(pipe: Any, encoder: str, word: str, shape: tuple[int, ...]) -> bool:
    """Whether a text encoder can take a word of these vectors."""
    model, tokenizer = getattr(pipe, encoder, None), getattr(pipe, encoder.replace("text_encoder", "tokenizer"), None)
    if model is None or tokenizer is None or len(shape) != 2 or not hasattr(pipe, "load_textual_inversion"):
        return False
    return model.get_input_embeddings().weight.shape[1] == shape[1] and word not in tokenizer.get_vocab()


def another_base(file: LoraFile, match: Match, pipe: Any) -> str:
    """The sentence for a file none of whose layers is in the base."""
    if kinds := unread_kinds(role for roles in file.layers.values() for role in roles):
        return f"{file.path}: {match.missing[0]} is of a kind ({', '.join(kinds)}) that rankfold does not read."
    return (
        f"{file.path} was made for another base model: none of its {len(file.layers)} layers, such as {match.missing[0]}, is in this "
        f"one, a {type(pipe).__name__}. {describe_origin(file)}"
    )


def unused_sentence(file: LoraFile, match: Match, pipe: Any) -> str:
    """The sentence for a file that holds more than the base has places for."""
    groups: dict[str, int] = {}
    for layer in match.missing:
        start = next(
            (
                p
                for p in ("lora_te1", "lora_te2", "lora_te3", "lora_te", "text_encoder", "bundle_emb")
                if layer.startswith(p)
            ),
            "",
        )
        groups[start or "the denoiser"] = groups.get(start or "the denoiser", 0) + 1
    where = ", ".join(f"{count} of {name}" for name, count in groups.items())
    layers = f" ({where} of {len(file.layers)} layers)" if where else ""
    return (
        f"{file.path} holds {len(match.unused)} tensors that have no place in this base model, a {type(pipe).__name__}{layers}, such as "
        f"{match.unused[0]}. {describe_origin(file)} To use the rest without them: {IGNORE}."
    )
