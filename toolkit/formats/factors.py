"""Adapters by their methods' own factors under kohya's names, as LyCORIS writes them: nothing is multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..core.errors import UserError
from ..core.files import write_atomic
from ..diffusion.families import family_of_denoiser
from . import native
from .adapter_facts import AdapterFacts
from .header import describe_file
from .match import Place, match_pipeline
from .read import LoraFile, read_lora
from .source import is_native
from .spellings import ENDINGS
from .stack import original_layers
from .write import FORMATS, Part, Tensors, kohya_name

FORMAT = "kohya-lycoris"
NAMES = {role: ending for ending, role in ENDINGS.items() if not ending.startswith((".lora", "_lora", ".w_", ".b_"))} | {
    "down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight",
}  # fmt: skip
"""Role -> how LyCORIS ends the tensor's name."""


def adapter_files(path: Path) -> list[LoraFile]:
    """The files of an adapter: one for each part of a folder of ours.

    Raises:
        UserError: when a file holds no factors that other tools know.
    """
    if not is_native(path):
        return [read_lora(path)]
    try:
        return [read_lora(path / part) for part in native.check_adapter_folder(path)]
    except UserError as error:
        raise UserError(
            f"--format {FORMAT} holds LoRA, DoRA, LoHa and LoKr by their own factors, and this adapter is of another method: use --format "
            "kohya, or kohya-full."
        ) from error


def factors_state(files: Sequence[LoraFile], pipe: Any, prefixes: dict[str, str]) -> Tensors:
    """All tensors of the files under kohya's names, with an alpha for each layer.

    Raises:
        UserError: for a layer that kohya's files keep together with others, so that it has no factors of its own there.
    """
    state: Tensors = {}
    for file in files:
        match = match_pipeline(file, pipe)
        for layer, place in match.places.items():
            if fault := file.fault(layer):
                raise UserError(f"{file.path}: {layer} {fault}.")
            key = layer_key(place, pipe, prefixes)
            state |= {f"{key}{name}": t for name, t in layer_tensors(file, layer, place, pipe).items()}
    return state


def write_factors(
    state: Tensors, parts: dict[str, Part], out: Path, facts: AdapterFacts, *, title: str, thumbnail: Path | None
) -> Path:
    """Writes such tensors, of the changes `parts`, into a folder; returns the file."""
    header = {"ss_network_module": "lycoris.kohya"} | describe_file(
        state, parts, facts, title=title, thumbnail=thumbnail
    )
    path = out / FORMATS[FORMAT]
    write_atomic(path, save(state, metadata={"format": "pt"} | header | facts.to_header()))
    return path


def layer_key(place: Place, pipe: Any, prefixes: dict[str, str]) -> str:
    """A layer's name in kohya's files."""
    model, name = getattr(pipe, place.part), place.layers[0]
    family = family_of_denoiser(model)
    if place.part not in prefixes:
        raise UserError(f"kohya's files have no names for the layers of {place.part}: use --format diffusers or peft.")
    if not family or not family.kohya_keeps_original_names:
        if len(place.layers) == 1 and not place.swapped:
            return kohya_name(prefixes[place.part], name)
        raise UserError(f"{name} is one of several layers that this file keeps as one: use --format kohya-full.")
    theirs = next(
        (t for t, o in original_layers(model).items() if o.layers == place.layers and o.swapped == place.swapped), ""
    )
    if not theirs:
        raise UserError(
            f"kohya's files keep {name} in one layer with others, so it has no factors of its own there: use --format kohya-full."
        )
    return f"{prefixes[place.part]}_{theirs.replace('.', '_')}"


def layer_tensors(file: LoraFile, layer: str, place: Place, pipe: Any) -> Tensors:
    """A layer's tensors by the endings of LyCORIS, at the scale that the file gives them."""
    roles, scale, rank = file.roles(layer), file.scale(layer, place.part, place.layers[0]), file.rank(layer)
    found: Tensors = {}
    whole = {"lokr_w1", "lokr_w2"} <= roles.keys()
    for role, tensor in roles.items():
        if role == "alpha":
            continue
        tensor = tensor.float()
        if role == "lokr_w1" and whole:  # whole factors have no alpha at work
            tensor = tensor * scale
        if role == "magnitude":
            sides = getattr(pipe, place.part).get_submodule(place.layers[0]).weight.dim()
            role, tensor = "dora_scale", tensor.reshape(-1, *[1] * (sides - 1))
        if role == "up_bias":
            role, tensor = "diff_b", tensor * scale
        found[NAMES[role]] = tensor.contiguous()
    if rank and not whole:
        found[".alpha"] = torch.tensor(scale * rank)
    return found
