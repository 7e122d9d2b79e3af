"""What a LoRA file is, whether it is sound, who can load it, and what to do about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from .read import LoraFile, layer_change, locate_layers, match_pipeline, read_lora

# The width of the prompt states that a cross-attention key projection reads, and which base has it.
BASE_BY_CONTEXT_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
# Part of a layer's name -> base. The first that occurs decides.
BASE_BY_LAYER_NAME = {
    "single_transformer_blocks": "FLUX",
    "lora_unet_single_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "attn_add_q_proj": "Stable Diffusion 3",
    "attn.add_q_proj": "Stable Diffusion 3",
    "lora_te2_": "Stable Diffusion XL",
    "text_encoder_2.": "Stable Diffusion XL",
    "language_model": "a vision-language model",
    "self_attn.q_proj": "a transformers model",
}
MAX_FACT_LENGTH = 200  # characters of a fact in a table


@dataclass(frozen=True)
class LayerReport:
    """One layer of a file."""

    name: str
    method: str
    rank: int | None
    scale: float
    norm: float | None
    """Frobenius norm of the change; None when it cannot be known without the base."""
    relative: float | None
    """The norm over that of the base's weight."""
    fault: str = ""
    """'nothing' for a change of zero, 'not finite', or why it cannot be read."""


@dataclass
class Report:
    """All that can be said about a file."""

    path: Path
    format: str
    base: str
    alpha: str
    """Where the file's scale comes from."""
    layers: list[LayerReport]
    loaders: dict[str, str]
    """Who loads it: 'yes', or why not."""
    advice: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """What it says of its making."""

    @property
    def is_valid(self) -> bool:
        """Whether nothing is wrong with any layer, and there is nothing to advise."""
        return not self.advice and not any(layer.fault for layer in self.layers)

    def table(self) -> list[tuple[str, str]]:
        """All but the layers and the advice, for people."""
        rows = [("format", self.format), ("base", self.base), ("alpha", self.alpha)]
        if self.layers:
            ranks = count_values(layer.rank for layer in self.layers if layer.rank)
            rows += [("methods", count_values(layer.method for layer in self.layers)), ("ranks", ranks or "none")]
        changes = sorted((layer.relative, layer.name) for layer in self.layers if layer.relative is not None)
        if changes:
            (middle, _), (most, name) = changes[len(changes) // 2], changes[-1]
            rows.append(("change", f"over the weight: median {middle:.1%}, largest {most:.1%} ({name})"))
        rows += [
            (key, text if len(text) <= MAX_FACT_LENGTH else f"{text[:MAX_FACT_LENGTH]} ...")
            for key, text in self.facts.items()
        ]
        return rows + [(f"loads in {loader}", answer) for loader, answer in self.loaders.items()]

    def summary(self) -> list[str]:
        """What is wrong and what to do, or that nothing is."""
        if not self.is_valid:
            return self.advice
        return ["No problems found: no layer is zero or not finite." if self.layers else "Sound: No problems found."]


def inspect_lora(path: Path, pipe: Any = None) -> Report:
    """Reads a file; with a pipeline (its base), changes are set against the base's weights.

    Raises:
        UserError: when the file cannot be read at all, or fits no layer of the pipeline.
    """
    file = read_lora(path) if pipe is None else match_pipeline(read_lora(path), pipe)
    places = locate_layers(file, pipe) if pipe is not None else {}
    if pipe is not None and not places:
        raise UserError(
            f"{path} was made for another base model: none of its {len(file.layers)} layers is in this one."
        )
    layers = [layer_report(file, name, places.get(name)) for name in file.layers]
    report = Report(path, file.format, detect_base(file), alpha_source(file), layers, compatible_loaders(file))
    report.facts = {k: v for k, v in file.header.items() if k not in ("format", "lora_adapter_metadata")}
    report.advice = advice_for(file, report, places if pipe is not None else None)
    return report


@torch.no_grad()
def layer_report(file: LoraFile, name: str, place: Any = None) -> LayerReport:
    """What one layer's tensors do."""
    method, rank, scale = file.method(name), file.rank(name), file.scale(name)
    common = {"name": name, "method": method, "rank": rank, "scale": scale}
    if not all(torch.isfinite(tensor).all() for tensor in file.layers[name].values()):
        return LayerReport(**common, norm=None, relative=None, fault="not finite")
    weight = place[2].weight.detach().float().flatten(1) if place else None
    try:
        change = layer_change(file, name, weight)
        if weight is None and change.is_low_rank and change.up is not None and change.down is not None:
            # |up down|^2 from r x r products, without the whole matrix.
            norm = float(((change.up.t() @ change.up) * (change.down @ change.down.t())).sum().clamp(min=0).sqrt())
        else:
            shape = change.dense if change.dense is not None else weight
            norm = float(change.delta_weight(torch.zeros_like(shape) if weight is None else weight).norm())  # type: ignore[arg-type]
    except UserError as error:
        return LayerReport(**common, norm=None, relative=None, fault="" if "--base" in str(error) else str(error))
    except RuntimeError:
        return LayerReport(**common, norm=None, relative=None, fault="shapes do not fit")
    fault = "nothing" if norm == 0 and (change.bias is None or not change.bias.any()) else ""
    return LayerReport(
        **common, norm=norm, relative=norm / float(weight.norm()) if weight is not None else None, fault=fault
    )


def detect_base(file: LoraFile) -> str:
    """The base that the names and widths point to."""
    said = (
        file.header.get("ss_base_model_version") or file.header.get("modelspec.architecture") or file.header.get("base")
    )
    if said:
        return f"{said} (by the header)"
    for name, base in BASE_BY_LAYER_NAME.items():
        if any(name in layer for layer in file.layers):
            return base
    for layer, roles in file.layers.items():
        if layer.endswith(("attn2.to_k", "attn2_to_k")) and "down" in roles:
            width = roles["down"].shape[1]
            return BASE_BY_CONTEXT_WIDTH.get(width, f"a diffusion UNet with prompt states {width} wide")
    return "unknown"


def alpha_source(file: LoraFile) -> str:
    """Where alpha is said."""
    scales = sorted({round(file.scale(layer), 6) for layer in file.layers})
    shown = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    if any("alpha" in roles for roles in file.layers.values()):
        return f"a tensor in each layer; scale alpha / rank = {shown}"
    if file.config():
        return f"in {'adapter_config.json' if file.format == 'peft' else 'the header'}; scale alpha / rank = {shown}"
    return "not said, so every reader takes scale 1"


def compatible_loaders(file: LoraFile) -> dict[str, str]:
    """Who loads the file as it is."""
    methods = {file.method(layer) for layer in file.layers}
    roles = {role for layer in file.layers.values() for role in layer}
    biases = "bias" in roles
    plain = methods <= {"lora"}
    diffusers = "yes"
    if file.format == "peft":
        diffusers = "no: load it with PeftModel.from_pretrained"
    elif "magnitude" in roles and file.format != "diffusers":
        diffusers = "wrongly: it drops dora_scale and loads another LoRA"
    elif not methods <= {"lora", "dora"}:
        diffusers = (
            f"no: it has no loader for {', '.join(sorted(methods - {'lora', 'dora'}))} in Stable Diffusion files"
        )
    elif biases and file.format in ("kohya", "lycoris"):
        diffusers = "no: it stops at diff_b"
    kohya = "yes" if file.format in ("kohya", "lycoris") else "ComfyUI may know the names; others do not"
    if not plain and file.format in ("kohya", "lycoris"):
        kohya = "yes, by their LyCORIS support"
    return {
        "diffusers load_lora_weights": diffusers,
        "PEFT": "yes" if file.format == "peft" else "no: it wants adapter_config.json beside adapter_model.safetensors",
        "kohya tools, A1111, ComfyUI": kohya if file.format != "peft" else "no",
    }


def advice_for(file: LoraFile, report: Report, places: dict[str, Any] | None) -> list[str]:
    """What is wrong and what to do."""
    advice = advice_on_layers(report.layers)
    if file.unknown_names:
        advice.append(
            f"{len(file.unknown_names)} tensors have names that no tool is known to write, such as {file.unknown_names[0]}."
        )
    if places is not None and len(places) < len(file.layers):
        missing = next(layer for layer in file.layers if layer not in places)
        advice.append(
            f"{len(file.layers) - len(places)} layers are not in this base, such as {missing}: it was made for another."
        )
    if file.format == "diffusers" and not file.config() and any(file.rank(layer) for layer in file.layers):
        advice.append("The header names no alpha. If it was trained with alpha other than rank, its scale is lost.")
    return advice


def advice_on_layers(layers: Sequence[LayerReport]) -> list[str]:
    """What is wrong with layers, and what to do."""
    advice = []
    faults = Counter(layer.fault for layer in layers if layer.fault)
    if faults.pop("not finite", 0):
        advice.append(
            "Some layers hold NaN or infinity: the file is corrupted; take an earlier checkpoint, or train in fp32 or bf16."
        )
    if empty := faults.pop("nothing", 0):
        whole = empty == len(layers)
        advice.append(
            "All layers change nothing: the adapter never learned; raise the learning rate and train again."
            if whole
            else f"{empty} layers change nothing; harmless if they were not trained."
        )
    advice += [f"{count} layers: {fault}" for fault, count in faults.items()]
    strong = [layer for layer in layers if layer.relative is not None and layer.relative > 1]
    if strong:
        advice.append(
            f"{len(strong)} layers change more than the whole weight, such as {strong[0].name}: lower the strength."
        )
    return advice


def count_values(values: Iterable[Any]) -> str:
    """Values with how often each occurs."""
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common())


def to_json(report: Report) -> str:
    """The report for programs."""
    values = vars(report) | {"path": str(report.path), "layers": [vars(layer) for layer in report.layers]}
    return json.dumps(values, indent=1)
