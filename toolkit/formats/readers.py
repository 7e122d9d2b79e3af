"""Who loads a file: diffusers, asked by its own converters; the others, by the names and kinds that they are known to read."""

from __future__ import annotations

import importlib
import re
import warnings
from types import SimpleNamespace
from typing import Any

import torch

from ..diffusion.families import FAMILIES
from .diagnose import detect_family
from .match import PipelineNames
from .methods import EXTRAS
from .read import LoraFile

CONVERTED = re.compile(
    r"^(unet|transformer|text_encoder|text_encoder_2)\."
    r"(.+?)\.?(_lora|\.lora(_linear_layer)?|lora_[AB]|lora_magnitude_vector|alpha)(\.(up|down))?(\.(weight|bias))?$"
)
LORA_ROLES = {"down", "up", "up_bias", "magnitude", "alpha"}
COMFY_KINDS = {"lora", "dora", "loha", "lokr", "glora", "full", "bias", "oft", "boft", "dora-loha", "dora-lokr"}


def compatible_loaders(file: LoraFile, pipe: Any = None) -> dict[str, str]:
    """Loader -> 'yes', or why not. pipe: the base, whose loader is then the one that is asked."""
    peft = "yes" if file.format == "peft" else "no: it wants adapter_config.json beside adapter_model.safetensors"
    return {
        "diffusers load_lora_weights": diffusers_answer(file, pipe),
        "PEFT": peft,
        "kohya tools, A1111, ComfyUI": kohya_answer(file),
    }


def kohya_answer(file: LoraFile) -> str:
    """What is known of the readers of kohya's names; none of them can be run here."""
    if file.format == "peft":
        return "no"
    kinds = {file.method(layer) for layer in file.layers}
    if file.format in ("kohya", "lycoris"):
        return "yes" if kinds <= {"lora"} else "yes, by their LyCORIS support"
    if file.format == "comfyui":
        return (
            "ComfyUI: yes; others do not know the names"
            if kinds <= COMFY_KINDS
            else "ComfyUI knows the names, not all kinds"
        )
    return "ComfyUI may know the names; others do not"


def diffusers_answer(file: LoraFile, pipe: Any = None) -> str:
    """What the installed diffusers makes of the file, tried with the loader of the pipeline or, without one, of the family."""
    if file.format == "peft":
        return "no: load it with PeftModel.from_pretrained"
    kind = pipeline_class(file, pipe)
    if kind is None or not hasattr(kind, "lora_state_dict"):
        return "not tried: name the base with --base"
    methods = {file.method(layer) for layer in file.layers}
    state = {name: file.tensors.load(name) for name in file.tensors.infos}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = kind.lora_state_dict(state, unet_config=unet_config(file, pipe))
    except Exception as error:  # its converters stop at what they do not know in many ways
        return f"no: it stops with {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    converted = found[0] if isinstance(found, tuple) else found
    strange = [name for name in converted if not CONVERTED.match(name)]
    if len(strange) == len(converted):
        return f"no: it knows none of the names{kinds_note(methods)}"
    if strange:
        return f"wrongly: it overlooks {len(strange)} tensors, such as {strange[0]}"
    dropped = {role for layer in file.layers.values() for role in layer} - LORA_ROLES
    if dropped & {*EXTRAS, "mid"}:
        return f"wrongly: it drops {', '.join(sorted(dropped))} and loads another LoRA"
    if dropped:
        return f"no: it has no loader for {', '.join(sorted(methods - {'lora'}))}"
    if pipe is not None and (lost := lost_layers(converted, pipe)):
        return f"wrongly: {lost} is not a layer of this base"
    return "yes"


def kinds_note(methods: set[str]) -> str:
    """' (lokr)' where a file is not plain LoRA."""
    other = sorted(methods - {"lora", "dora"})
    return f" ({', '.join(other)})" if other else ""


def lost_layers(converted: dict[str, torch.Tensor], pipe: Any) -> str:
    """The first of the converted names that is no layer of the pipeline; '' when all are."""
    names = PipelineNames(pipe)
    layers = dict.fromkeys(f"{match[1]}.{match[2]}" for name in converted if (match := CONVERTED.match(name)))
    return next((layer for layer in layers if names.find(layer) is None), "")


def pipeline_class(file: LoraFile, pipe: Any) -> Any:
    """The class whose loader is asked."""
    if pipe is not None and hasattr(type(pipe), "lora_state_dict"):
        return type(pipe)
    title = detect_family(file)
    family = next((f for f in reversed(FAMILIES) if f.title and title.startswith(f.title)), None)
    if family is None:
        family = next((f for f in FAMILIES if "Stable Diffusion" in title and f.title == "Stable Diffusion"), None)
    return getattr(importlib.import_module("diffusers"), family.pipelines[0], None) if family else None


def unet_config(file: LoraFile, pipe: Any) -> Any:
    """What diffusers' converter of SGM names asks of a UNet; for a file without its base the released one's."""
    unet = getattr(pipe, "unet", None)
    return unet.config if unet is not None else SimpleNamespace(layers_per_block=2)
