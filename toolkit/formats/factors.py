"""Adapters by their methods' own factors, as LyCORIS writes them, by the names of kohya's tools or ComfyUI's: nothing is multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import nn

from ..core.errors import UserError
from ..core.files import write_atomic
from ..diffusion.families import family_of_denoiser
from ..diffusion.original_layers import OriginalLayer
from .adapter_facts import AdapterFacts
from .adapter_folder import check_adapter_folder, is_native
from .factor_rows import Factors, cut_rows, stack_rows, swap_factors
from .header import describe_file
from .match import Match, Place, match_pipeline
from .read import LoraFile, read_lora
from .spellings import ENDINGS
from .stack import original_layers
from .write import FORMATS, Part, Tensors, comfy_start, kohya_name, text_name

FACTOR_FORMATS = ("kohya-lycoris", "comfyui-lycoris")
NAMES = {role: ending for ending, role in ENDINGS.items() if not ending.startswith((".lora", "_lora", ".w_", ".b_"))} | {
    "down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight",
}  # fmt: skip
"""Role -> how LyCORIS ends the tensor's name."""
Owner = tuple[str, OriginalLayer]
"""A layer's name in the file, and those of ours that it is."""
NO_FACTORS = (
    "--format {} holds LoRA, DoRA, LoHa and LoKr by their own factors, and this adapter is of another method: use --format kohya, or "
    "kohya-full."
)


def check_factors(layer: nn.Module, format: str) -> None:
    """Raises UserError when the method of an adapted layer has no factors that other tools know."""
    if not isinstance(layer, (LoraLayer, LoHaLayer, LoKrLayer)):
        raise UserError(NO_FACTORS.format(format))


def adapter_files(path: Path, format: str) -> list[LoraFile]:
    """The files of an adapter: one for each part of a folder of ours.

    Raises:
        UserError: when a file holds no factors that other tools know.
    """
    if not is_native(path):
        return [read_lora(path)]
    try:
        return [read_lora(path / part) for part in check_adapter_folder(path)]
    except UserError as error:
        raise UserError(NO_FACTORS.format(format)) from error


def factors_state(files: Sequence[LoraFile], pipe: Any, format: str, prefixes: dict[str, str]) -> Tensors:
    """All tensors of the files under the format's names, with an alpha for each layer of a rank.

    Raises:
        UserError: for a layer that has no name there, or whose factors cannot be those of a layer that keeps it together with others.
    """
    state: Tensors = {}
    for file in files:
        match = match_pipeline(file, pipe)
        for part in dict.fromkeys(place.part for place in match.places.values()):
            model: nn.Module = getattr(pipe, part)
            owner_of = layer_owners(format, part, model, prefixes)
            for key, original, factors in owned_factors(file, match, part, model, owner_of):
                first: Any = model.get_submodule(original.layers[0])
                state |= {f"{key}{name}": t for name, t in file_tensors(factors, first.weight.dim()).items()}
    return state


def write_factors(
    state: Tensors,
    parts: dict[str, Part],
    format: str,
    out: Path,
    facts: AdapterFacts,
    *,
    title: str,
    thumbnail: Path | None,
) -> Path:
    """Writes such tensors, of the changes `parts`, into a folder; returns the file."""
    header = {"ss_network_module": "lycoris.kohya"} if format.startswith("kohya") else {}
    header |= describe_file(state, parts, facts, title=title, thumbnail=thumbnail)
    path = out / FORMATS[format]
    write_atomic(path, save(state, metadata={"format": "pt"} | header | facts.to_header()))
    return path


def layer_owners(format: str, part: str, model: nn.Module, prefixes: dict[str, str]) -> Callable[[str], Owner]:
    """Our layer -> the file's layer that it is, or is a part of.

    Raises:
        UserError: by the function, for a layer that has no name there.
    """
    comfy, family = format.startswith("comfyui"), family_of_denoiser(model)
    if not comfy and part not in prefixes:
        raise UserError(f"kohya's files have no names for the layers of {part}: use --format diffusers or peft.")
    original = bool(family) and (comfy or family.kohya_keeps_original_names)
    owners = {
        name: (theirs, found)
        for theirs, found in (original_layers(model) if original else {}).items()
        for name in found.layers
    }

    def owner(name: str) -> Owner:
        theirs, layers = owners.get(name, ("", OriginalLayer((name,))))
        if comfy:
            own = text_name(name) if part.startswith("text_encoder") else name
            return comfy_start(part, model) + (theirs or own), layers
        if original and not theirs:
            raise UserError(f"kohya's files have no name for the layer {name}: use --format diffusers or peft.")
        key = f"{prefixes[part]}_{theirs.replace('.', '_')}" if theirs else kohya_name(prefixes[part], name)
        return key, layers

    return owner


def owned_factors(
    file: LoraFile, match: Match, part: str, model: nn.Module, owner_of: Callable[[str], Owner]
) -> Iterator[tuple[str, OriginalLayer, Factors]]:
    """(name in the new file, our layers, factors) of all layers of a part that the file changes."""
    pieces: dict[str, Factors] = {}
    for layer, place in match.places.items():
        if place.part != part:
            continue
        key, original = owner_of(place.layers[0])
        factors = layer_factors(file, layer, place)
        try:
            if (place.layers, place.swapped) == (original.layers, original.swapped):
                yield key, original, factors
            elif len(place.layers) == 1 and not place.swapped:
                pieces[place.layers[0]] = factors
            else:
                factors = swap_factors(factors) if place.swapped else factors
                pieces |= zip(place.layers, cut_rows(factors, row_counts(model, place.layers)), strict=True)
        except UserError as error:
            raise together_error(place.layers[0], error) from error
    for key, original in dict.fromkeys(owner_of(name) for name in pieces):
        own = [pieces.get(name) for name in original.layers]
        try:
            yield key, original, stack_pieces(own, original, model)
        except UserError as error:
            raise together_error(original.layers[0], error) from error


def together_error(name: str, error: UserError) -> UserError:
    """What to do about factors that cannot be cut or stacked."""
    return UserError(
        f"{name} is kept in one layer with others, and its own factors cannot be: it {error}. Use kohya-full, which holds whole changes."
    )


def stack_pieces(pieces: list[Factors | None], original: OriginalLayer, model: nn.Module) -> Factors:
    """The factors of the layer of the original."""
    (first, *others) = pieces
    stacked = first if first is not None and not others else None
    if stacked is None:
        norms = lambda number: row_norms(model, original.layers[number])  # noqa: E731
        stacked = stack_rows(pieces, row_counts(model, original.layers), norms)
    return swap_factors(stacked) if original.swapped else stacked


def row_counts(model: nn.Module, layers: Sequence[str]) -> list[int]:
    """Outputs of each layer."""
    modules: list[Any] = [model.get_submodule(name) for name in layers]
    return [len(module.weight) for module in modules]


def row_norms(model: nn.Module, name: str) -> torch.Tensor:
    """Norms (out,) of a layer's rows."""
    module: Any = model.get_submodule(name)
    return module.weight.detach().float().cpu().flatten(1).norm(dim=1)


def layer_factors(file: LoraFile, layer: str, place: Place) -> Factors:
    """A layer's factors as the file has them."""
    if fault := file.fault(layer):
        raise UserError(f"{file.path}: {layer} {fault}.")
    tensors = {role: tensor.float() for role, tensor in file.roles(layer).items()}
    scale, rank = file.scale(layer, place.part, place.layers[0]), file.rank(layer)
    bias = tensors.pop("up_bias", None)
    if bias is not None:
        tensors["bias"] = bias * scale
    if "diff_b" in tensors:
        tensors["bias"] = tensors.pop("diff_b") + tensors.get("bias", 0)
    if "dora_scale" in tensors and is_by_output(tensors["dora_scale"]):
        tensors["magnitude"] = tensors.pop("dora_scale")
    if "magnitude" in tensors:
        tensors["magnitude"] = tensors["magnitude"].flatten()
    return Factors(tensors, scale, rank)


def is_by_output(dora_scale: torch.Tensor) -> bool:
    """Whether LyCORIS' magnitude is one of outputs (out, 1, ...), and not of inputs (1, in, ...)."""
    return len(dora_scale) > 1 and dora_scale.numel() == len(dora_scale)


def file_tensors(factors: Factors, dimensions: int) -> Tensors:
    """A layer's tensors by the endings of LyCORIS. dimensions: of the layer's weight."""
    tensors = dict(factors.tensors)
    whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
    if whole:  # whole factors have no alpha at work
        tensors = factors.baked().tensors
    if "magnitude" in tensors:
        magnitude = tensors.pop("magnitude")
        tensors |= {"dora_scale": magnitude.reshape(-1, *[1] * (dimensions - 1))}
    if "bias" in tensors:
        tensors |= {"diff_b": tensors.pop("bias")}
    found = {NAMES[role]: tensor.contiguous() for role, tensor in tensors.items()}
    if factors.rank and not whole:
        found[".alpha"] = torch.tensor(factors.scale * factors.rank)
    return found
