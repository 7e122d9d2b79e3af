"""Transformers whose layers kohya's files call as the original code does, where several of ours are one.

FLUX.1 and SD 3: the original keeps q, k and v of a block in one layer, FLUX.1 in single blocks the MLP's first layer with them. Changes of
ours are stacked exactly: their down factors one above the other, their up factors on the diagonal. Reading slices the rows again.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.change import Change
from ..adapters.fold import Folded
from ..core.errors import UserError

ATTENTION = {  # stream -> (query, key, value), output
    "img": (("to_q", "to_k", "to_v"), "to_out.0"),
    "txt": (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
}
MLP = {"img": "ff", "txt": "ff_context"}
NORM = {"img": "norm1", "txt": "norm1_context"}


def flux_layers() -> dict[str, tuple[str, ...]]:
    """Original layer -> ours, the block's number as {}."""
    names: dict[str, tuple[str, ...]] = {}
    for stream, (inner, outer) in ATTENTION.items():
        theirs, ours = f"double_blocks_{{}}_{stream}", "transformer_blocks.{}"
        names[f"{theirs}_attn_qkv"] = tuple(f"{ours}.attn.{name}" for name in inner)
        names[f"{theirs}_attn_proj"] = (f"{ours}.attn.{outer}",)
        names[f"{theirs}_mlp_0"] = (f"{ours}.{MLP[stream]}.net.0.proj",)
        names[f"{theirs}_mlp_2"] = (f"{ours}.{MLP[stream]}.net.2",)
        names[f"{theirs}_mod_lin"] = (f"{ours}.{NORM[stream]}.linear",)
    theirs, ours = "single_blocks_{}", "single_transformer_blocks.{}"
    names[f"{theirs}_linear1"] = (*(f"{ours}.attn.{name}" for name in ATTENTION["img"][0]), f"{ours}.proj_mlp")
    names[f"{theirs}_linear2"] = (f"{ours}.proj_out",)
    names[f"{theirs}_modulation_lin"] = (f"{ours}.norm.linear",)
    return names


def stable_diffusion_3_layers() -> dict[str, tuple[str, ...]]:
    """The same for SD 3 and 3.5.

    The modulation of the words is left out: in the last block the original keeps its halves the other way round.
    """
    names: dict[str, tuple[str, ...]] = {}
    ours = "transformer_blocks.{}"
    for stream, block in (("img", "x_block"), ("txt", "context_block")):
        theirs, (inner, outer) = f"joint_blocks_{{}}_{block}", ATTENTION[stream]
        names[f"{theirs}_attn_qkv"] = tuple(f"{ours}.attn.{name}" for name in inner)
        names[f"{theirs}_attn_proj"] = (f"{ours}.attn.{outer}",)
        names[f"{theirs}_mlp_fc1"] = (f"{ours}.{MLP[stream]}.net.0.proj",)
        names[f"{theirs}_mlp_fc2"] = (f"{ours}.{MLP[stream]}.net.2",)
    inner, outer = ATTENTION["img"]
    names["joint_blocks_{}_x_block_attn2_qkv"] = tuple(f"{ours}.attn2.{name}" for name in inner)
    names["joint_blocks_{}_x_block_attn2_proj"] = (f"{ours}.attn2.{outer}",)
    names["joint_blocks_{}_x_block_adaLN_modulation_1"] = (f"{ours}.{NORM['img']}.linear",)
    return names


TABLES = {"FluxTransformer2DModel": flux_layers(), "SD3Transformer2DModel": stable_diffusion_3_layers()}
PREFIX = "lora_unet_"  # also for transformers
OUTPUT_ROLES = ("up", "diff", "bias")  # tensors whose rows are the layer's outputs
Roles = dict[str, torch.Tensor]  # role -> tensor, see read.py


def layer_table(model: Any) -> dict[str, tuple[str, ...]]:
    """The original layers of a denoiser; none where kohya's names are its own."""
    return TABLES.get(type(model).__name__, {})


def block_numbers(pattern: str, model: nn.Module) -> list[str]:
    """The numbers for which a model has the first layer of a pattern."""
    found = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return [match[1] for name, _ in model.named_modules() if (match := found.fullmatch(name))]


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Original layer -> our layers, for all blocks of a model."""
    return {
        theirs.format(number): [name.format(number) for name in ours]
        for theirs, ours in layer_table(model).items()
        for number in block_numbers(ours[0], model)
    }


def num_outputs(model: nn.Module, name: str) -> int:
    """Outputs of a layer."""
    layer: Any = model.get_submodule(name)
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).out_features


def fuse_layers(model: nn.Module, folded: Folded) -> dict[str, tuple[Change, list[str]]]:
    """Original layer -> its change, stacked where it is several of our layers, and their names.

    Raises:
        UserError: for a layer that the original has no name for.
    """
    groups = layer_groups(model)
    known = {name for ours in groups.values() for name in ours}
    if strange := sorted(set(folded) - known):
        raise UserError(f"kohya's files have no name for the layer {strange[0]}: use --format diffusers or peft.")
    return {
        theirs: (stack_changes([(folded.get(name), num_outputs(model, name)) for name in ours]), ours)
        for theirs, ours in groups.items()
        if any(name in folded for name in ours)
    }


def stack_changes(rows: list[tuple[Change | None, int]]) -> Change:
    """One change of a layer whose outputs are those of several, each with its own change (or none) and number of outputs."""
    total, placed, start = sum(count for _, count in rows), [], 0
    for change, count in rows:
        if change is not None:
            placed.append(pad_rows(change, start, total - start - count))
        start += count
    return Change.sum(placed)


def pad_rows(change: Change, above: int, below: int) -> Change:
    """The same change of a layer that has so many other outputs above and below these."""
    tensors = {name: getattr(change, name) for name in ("up", "rows", "mask_up", "bias", "dense")}
    wider = {
        name: F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (above, below))
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return replace(change, **wider)


def split_fused_layers(layers: dict[str, Roles], pipe: Any) -> dict[str, Roles]:
    """A file's layers, those with original names of the pipeline's denoiser put as ours."""
    model, found = getattr(pipe, "transformer", None), dict(layers)
    for theirs, ours in layer_groups(model).items() if isinstance(model, nn.Module) else ():
        if (roles := found.pop(PREFIX + theirs, None)) is not None:
            rows = split_rows(roles, [num_outputs(model, name) for name in ours])
            # Rows of nothing are a layer that was stacked with others and not trained.
            told = {name: own for name, own in zip(ours, rows, strict=True) if has_effect(own)}
            found |= {f"transformer.{name}": own for name, own in (told or dict(zip(ours, rows, strict=True))).items()}
    return found


def split_rows(roles: Roles, counts: list[int]) -> list[Roles]:
    """The tensors of a layer, cut into layers of so many outputs each."""
    cut = {role: tensor.split(counts) for role, tensor in roles.items() if role in OUTPUT_ROLES}
    return [{role: cut[role][n] if role in cut else roles[role] for role in roles} for n in range(len(counts))]


def has_effect(roles: Roles) -> bool:
    """Whether a layer's tensors change anything."""
    return any(bool(roles[role].any()) for role in OUTPUT_ROLES if role in roles)
