"""Which tool wrote a file, for which family of base models, and in which width, told from its names, shapes and header."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ..diffusion.families import FAMILIES
from .read import LoraFile

# Looked at first: names that only these have. Of no family of ours, but for Chroma, which shares its others with FLUX.1.
OTHERS = {
    "HunyuanVideo": (
        r"(double|single)_blocks_\d+_(img_attn_qkv|txt_attn_qkv).*img_attn_q_norm",
        r"individual_token_refiner",
    ),
    "Wan": (r"(^|_)blocks_\d+_(self|cross)_attn_[qkvo]$",),
    "LTX-Video": (r"patchify_proj", r"transformer_blocks_\d+_scale_shift_table"),
    "PixArt": (r"adaln_single",),
    "AuraFlow": (r"joint_transformer_blocks_\d+",),
    "Chroma": (r"distilled_guidance_layer",),
    "Stable Cascade": (r"lora_prior_",),
    "a language model": (r"model_layers_\d+_self_attn_[qkvo]_proj",),
}
CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""Width of the prompt states that a UNet's cross-attention reads -> the base that has it."""
TOOLS = {
    "kohya's sd-scripts": ("ss_sd_scripts_commit_hash", "ss_network_module"),
    "ai-toolkit": ("ostris", "ai-toolkit"),
    "OneTrainer": ("ot_branch", "ot_revision", "OneTrainer"),
    "musubi-tuner": ("musubi",),
    "SimpleTuner": ("simpletuner",),
}


def describe_origin(file: LoraFile) -> str:
    """'It looks like a file for FLUX.1, 3072 wide, written by kohya's sd-scripts.'"""
    family, tool = detect_family(file), detect_tool(file)
    width = f", {widest(file)} wide" if family and widest(file) else ""
    if not family and not tool:
        return "Its names are of no family that rankfold knows."
    by = f" written by {tool}" if tool else ""
    return f"It looks like a file for {family}{width}{',' if by else ''}{by}." if family else f"It was{by}."


def detect_family(file: LoraFile) -> str:
    """The family that names and widths point to; '' when they point to none."""
    names = [layer.replace(".", "_") for layer in file.layers]
    for title, marks in OTHERS.items():
        if any(re.search(mark, name) for mark in marks for name in names[:2000]):
            return title
    votes: Counter[str] = Counter()
    for family in FAMILIES:
        for mark in family.layer_marks:
            found = sum(bool(re.search(mark, name)) for name in names[:2000])
            if found:
                votes[family.title] += found
                break
    if not votes:
        return "Stable Diffusion XL" if any(name.startswith(("lora_te2_", "text_encoder_2_")) for name in names) else ""
    best = "FLUX.2" if votes["FLUX.2"] else votes.most_common(1)[0][0]  # which shares most names with FLUX.1
    if not best.startswith("Stable Diffusion") or best == "Stable Diffusion 3":
        return best
    if any(re.search(r"(input|output)_blocks_\d+_\d|middle_block_\d", name) for name in names):
        return "Stable Diffusion XL"
    for layer in file.layers:
        if (
            layer.endswith(("attn2.to_k", "attn2_to_k"))
            and (info := file.infos(layer).get("down"))
            and len(info.shape) > 1
        ):
            width = info.shape[1]
            return CONTEXT_WIDTHS.get(width, f"a Stable Diffusion UNet with prompt states {width} wide")
    return "Stable Diffusion XL" if any(name.startswith(("lora_te2_", "text_encoder_2_")) for name in names) else best


def widest(file: LoraFile) -> int:
    """The commonest width of the layers' inputs."""
    widths = Counter(
        info.shape[1] for layer in file.layers if (info := file.infos(layer).get("down")) and len(info.shape) > 1
    )
    return widths.most_common(1)[0][0] if widths else 0


def detect_tool(file: LoraFile) -> str:
    """Which program wrote a file, where its header says so; '' otherwise."""
    text: Any = " ".join(f"{key} {str(value)[:200]}" for key, value in file.header.items())
    return next((tool for tool, marks in TOOLS.items() if any(mark in text for mark in marks)), "")


def detect_base(file: LoraFile) -> str:
    """The base that header, names and widths point to."""
    for key in ("base", "ss_base_model_version", "modelspec.architecture"):
        if said := file.header.get(key):
            return f"{said} (by the header)"
    return detect_family(file) or "unknown"
