"""Plain LoRA files for other tools, written from folded changes.

    diffusers     one file for `pipe.load_lora_weights`; bias changes as lora_B.bias
    peft          a folder for each part, for `PeftModel.from_pretrained`
    comfyui       one file that names the denoiser's layers as the original code does, behind diffusion_model.
    kohya         one file as kohya's tools, A1111 and ComfyUI name layers; bias changes as diff_b
    kohya-full    the same names with the whole weight change (diff): large, exact for any linear adapter
    kohya-glora   the same names with GLoRA's own factors a1, a2, b1, b2: follows the base it is loaded on
    kohya-lycoris the same names with LoRA's, DoRA's, LoHa's or LoKr's own factors (factors.py)
    comfyui-lycoris these factors by the names of comfyui

alpha is baked into the up factor and written as alpha = rank, so that each reader's own convention gives scale 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import nn

from ..adapters.fold import Folded
from ..adapters.variants.glora import GloraLayer
from ..core.change import Change
from ..core.errors import UserError, did_you_mean
from ..core.files import write_atomic
from ..diffusion.families import family_of_denoiser
from .adapter_facts import AdapterFacts
from .header import describe_file
from .native import write_state
from .stack import StackedChange, stack_layers

FORMATS = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "peft",
    "comfyui": "comfyui.safetensors",
    "kohya": "kohya.safetensors",
    "kohya-full": "kohya_full.safetensors",
    "kohya-glora": "kohya_glora.safetensors",
    "kohya-lycoris": "kohya_lycoris.safetensors",
    "comfyui-lycoris": "comfyui_lycoris.safetensors",
}
LOW_RANK = ("diffusers", "peft", "kohya", "comfyui")  # formats that hold nothing but LoRA factors and biases
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One part of a pipeline, its changes, and the layers they belong to."""

    model: nn.Module
    folded: Folded
    adapter: str

    def layer(self, name: str) -> nn.Module:
        """The frozen layer of this name."""
        module: Any = self.model.get_submodule(name)
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def check_format(format: str) -> None:
    """Raises UserError for a format that nobody knows."""
    if format not in FORMATS:
        raise UserError(
            f"--format {format} is unknown; choose one of {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )


def write_lora(
    parts: dict[str, Part],
    format: str,
    out: Path,
    facts: AdapterFacts,
    prefixes: dict[str, str],
    *,
    title: str = "",
    thumbnail: Path | None = None,
) -> Path:
    """Writes the parts in one of FORMATS into a folder; returns the file, or the folder for peft. `facts` go into the header.

    prefixes: how kohya's files begin the names of each part's layers. title, thumbnail: for the header of those files that people
    choose from lists.

    Raises:
        UserError: when the format cannot represent the changes; the sentence names a layer and a format that can.
    """
    check_format(format)
    for part in parts.values():
        check_representable(part, format)
    out.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        for name, part in parts.items():
            (out / "peft" / name).mkdir(parents=True, exist_ok=True)
            state, config = peft_state(part)
            write_state(out / "peft" / name, state, config)
        facts.save(out / "peft")
        return out / "peft"
    if format == "diffusers":
        state, header = diffusers_state(parts)
    elif format == "comfyui":
        state, header = comfyui_state(parts), {}
    else:
        state, header = kohya_state(parts, format, facts, prefixes)
    path = out / FORMATS[format]
    header = describe_file(state, parts, facts, title=title or path.stem, thumbnail=thumbnail) | header
    write_atomic(path, save(state, metadata={"format": "pt"} | header | facts.to_header()))
    return path


def add_to_header(path: Path, entries: dict[str, str]) -> None:
    """Adds entries to a file's header; not a byte of its tensors is touched."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = header.get("__metadata__", {}) | entries
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, len(text).to_bytes(8, "little") + text + data[end:])


def check_representable(part: Part, format: str) -> None:
    """Raises UserError when the format cannot represent the part's changes."""
    for name, change in part.folded.items():
        if format in LOW_RANK and not change.is_low_rank:
            own = "comfyui-lycoris" if format == "comfyui" else "kohya-lycoris"
            raise UserError(
                f"The change of {name} is of full rank and has no exact plain LoRA: use --format {own} (the method's own factors), "
                "kohya-full (whole changes), or --approximate."
            )
        if change.changes_bias and format.startswith(("kohya", "comfyui")) and part.layer(name).bias is None:
            raise UserError(
                f"The adapter gives {name} a bias that the base model's layer does not have, and {format} files cannot "
                "represent that: use --format diffusers, or leave the bias changes out with --drop-bias."
            )


def drop_biases(folded: Folded) -> Folded:
    """The changes without those of biases."""
    return {name: Change(**(vars(change) | {"bias": None})) for name, change in folded.items()}


def lora_factors(change: Change, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) for a weight of this shape as LoRA files store them: kernels for convolutions; zeros when there are none."""
    down, up = change.down, change.up
    if down is None or up is None:
        down, up = torch.zeros(1, math.prod(shape[1:])), torch.zeros(shape[0], 1)
    if len(shape) > 2:
        down, up = down.view(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))
    return down.contiguous(), up.contiguous()


# ---------------------------------------------------------------------------------------------- diffusers, PEFT


def peft_state(part: Part) -> tuple[Tensors, LoraConfig]:
    """Tensors named as PEFT names them, and the config they belong to: alpha = rank, layers by their full names."""
    state: Tensors = {}
    biased = any(change.bias is not None for change in part.folded.values())
    ranks = {}
    for name, change in part.folded.items():
        down, up = lora_factors(change, part.layer(name).weight.shape)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
        ranks[name] = len(down)
        if biased:  # one switch for all layers, so the others get a zero
            state[f"{name}.lora_B.bias"] = torch.zeros(len(up)) if change.bias is None else change.bias
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return state, LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other),
        lora_bias=biased,
    )


def diffusers_state(parts: dict[str, Part]) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header for diffusers, with the adapter metadata of every part."""
    state: Tensors = {}
    metadata: dict[str, Any] = {}
    for name, part in parts.items():
        tensors, config = peft_state(part)
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
        plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
        metadata |= {f"{name}.{key}": value for key, value in plain.items()}
    return state, {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True, default=str)}


# ---------------------------------------------------------------------------------------------- ComfyUI


def comfyui_state(parts: dict[str, Part]) -> Tensors:
    """Tensors by the names that ComfyUI's own models have; alpha = rank, which its loader takes for scale 1."""
    state: Tensors = {}
    for part_name, part in parts.items():
        if part_name.startswith("text_encoder"):
            stacked = {text_name(name): StackedChange(c, (name,), False) for name, c in part.folded.items()}
        else:
            stacked = stack_layers(part.model, part.folded, keep_own_names=True)
        start = comfy_start(part_name, part.model)
        for theirs, one in stacked.items():
            layers: list[Any] = [part.layer(name) for name in one.layers]
            shape = (sum(len(layer.weight) for layer in layers), *layers[0].weight.shape[1:])
            key = start + theirs
            down, up = lora_factors(one.change, shape)
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down, up
            state[f"{key}.alpha"] = torch.tensor(float(len(down)))
            if one.change.bias is not None and layers[0].bias is not None:
                state[f"{key}.diff_b"] = one.change.bias
    return state


def comfy_start(part: str, model: nn.Module) -> str:
    """How ComfyUI begins the names of a part's layers."""
    return (
        f"text_encoders.{comfy_encoder(part, model)}.transformer."
        if part.startswith("text_encoder")
        else "diffusion_model."
    )


def comfy_encoder(part: str, model: nn.Module) -> str:
    """What ComfyUI calls a text encoder."""
    if type(model).__name__.startswith("T5"):
        return "t5xxl"
    return "clip_g" if part == "text_encoder_2" else "clip_l"


def text_name(name: str) -> str:
    """A text encoder's layer with the level of names that CLIP's text model had when readers of files were written."""
    return name if name.startswith(("text_model.", "encoder.block")) else f"text_model.{name}"


# ---------------------------------------------------------------------------------------------- kohya


def kohya_name(prefix: str, layer: str) -> str:
    """A layer's name in kohya's files."""
    layer = text_name(layer) if prefix.startswith("lora_te") else layer
    return f"{prefix}_{layer.replace('.', '_')}"


def kohya_layers(part: Part, prefix: str) -> dict[str, tuple[Change, list[str]]]:
    """Name in kohya's files -> the change, and our layers that it belongs to."""
    family = family_of_denoiser(part.model)
    if family and family.kohya_keeps_original_names:
        stacked = stack_layers(part.model, part.folded, keep_own_names=False)
        return {
            f"{prefix}_{theirs.replace('.', '_')}": (one.change, list(one.layers)) for theirs, one in stacked.items()
        }
    return {kohya_name(prefix, name): (change, [name]) for name, change in part.folded.items()}


def kohya_state(
    parts: dict[str, Part], format: str, facts: AdapterFacts, prefixes: dict[str, str]
) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header for kohya's names."""
    state: Tensors = {}
    ranks = {1}
    for part_name, part in parts.items():
        for key, (change, names) in kohya_layers(part, prefixes[part_name]).items():
            layers: list[Any] = [part.layer(name) for name in names]
            shape = (sum(len(layer.weight) for layer in layers), *layers[0].weight.shape[1:])
            if format == "kohya-full":
                weight = torch.cat([layer.weight.detach().float().cpu() for layer in layers])
                delta = change.delta_weight(weight.reshape(len(weight), -1))
                state[f"{key}.diff"] = delta.view(weight.shape).contiguous()
            elif format == "kohya-glora":
                own = glora_tensors(part.model.get_submodule(names[0]), part.adapter, names[0], len(names))
                state |= {f"{key}.{k}": v for k, v in own.items()}
                ranks.add(state[f"{key}.a2.weight"].shape[0])
            else:
                down, up = lora_factors(change, shape)
                state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down, up
                ranks.add(len(down))
            if change.bias is not None and layers[0].bias is not None:
                state[f"{key}.diff_b"] = change.bias
    for part_name, part in parts.items():
        if format == "kohya" and part_name.startswith("text_encoder"):
            state |= text_encoder_marker(part, prefixes[part_name], state)
    if format == "kohya":
        set_common_alpha(state, float(max(ranks)))
    header = {
        "ss_network_module": "networks.lora" if format == "kohya" else "lycoris.kohya",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(ranks)),
    }
    if format != "kohya":
        header["ss_network_args"] = json.dumps({"algo": "full" if format == "kohya-full" else "glora"})
    return state, header


def set_common_alpha(state: Tensors, alpha: float) -> None:
    """Gives all layers of a file one alpha, which readers divide by each layer's rank, and takes that factor out of `up`.

    Layers with alphas of their own are what diffusers misreads where ranks differ.
    """
    for key in [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]:
        rank = len(state[f"{key}.lora_down.weight"])
        state[f"{key}.lora_up.weight"] = state[f"{key}.lora_up.weight"] * (rank / alpha)
        state[f"{key}.alpha"] = torch.tensor(alpha)


def text_encoder_marker(part: Part, prefix: str, state: Tensors) -> Tensors:
    """Factors of zero for one output projection of a text encoder, where no layer of that kind is in the file.

    diffusers knows kohya's text-encoder tensors by such a layer, and without one refuses the whole file.
    """
    if any(key.startswith(prefix) and "out_proj" in key for key in state):
        return {}
    found = [(n, m) for n, m in part.model.named_modules() if n.endswith("self_attn.out_proj")]
    if not found:  # not one of CLIP's
        return {}
    name, layer = found[0]
    down, up = lora_factors(Change(), layer.weight.shape)
    key = kohya_name(prefix, name)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}


def glora_tensors(layer: nn.Module, adapter: str, name: str, layers: int) -> Tensors:
    """GLoRA's own factors of one layer, as LyCORIS and ComfyUI name them; layers: of ours, that are one layer there.

    Raises:
        UserError: when the layer's structure has no such form.
    """
    check_glora(layer, adapter, name, layers)
    tensors = {k: v.detach().float().cpu() for k, v in layer.tensors(adapter).items()}  # type: ignore[operator]
    r, fan_in, fan_out = layer.r[adapter], layer.fan_in, layer.fan_out  # type: ignore[index]
    scale = layer.initial_scaling(adapter)  # type: ignore[operator]
    return {
        "a1.weight": tensors.get("a_up", torch.zeros(fan_in, r)) * scale,
        "a2.weight": tensors.get("a_down", torch.zeros(r, fan_in)),
        "b1.weight": tensors.get("b_up", torch.zeros(fan_out, r)) * scale,
        "b2.weight": tensors.get("b_down", torch.zeros(r, fan_in)),
        "alpha": torch.tensor(float(r)),
    }


def check_glora(layer: nn.Module, adapter: str, name: str, layers: int = 1) -> None:
    """Raises UserError when a layer's adapter is not GLoRA in the form that LyCORIS has; layers: see `glora_tensors`."""
    fits = (
        layers == 1
        and isinstance(layer, GloraLayer)
        and layer.settings[adapter].form == "matmul"
        and isinstance(layer.get_base_layer(), nn.Linear)
    )
    tensors = layer.tensors(adapter) if fits else {}  # type: ignore[operator]
    if not fits or any(f"{p}_up" in tensors and f"{p}_down" not in tensors for p in "ab"):
        raise UserError(
            f"--format kohya-glora holds GLoRA in matmul form with A and B lora or none on linear layers of their own; {name} is none. "
            "Use --format diffusers or kohya-full."
        )
