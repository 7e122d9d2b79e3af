"""What a LoRA file is, whether it is sound, who can load it, and what to do about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.change import Change
from ..core.errors import UserError
from .diagnose import detect_base, detect_tool
from .layer_changes import frozen_weight, own_rows, scale_notes
from .match import Match, match_pipeline
from .methods import NeedsWeightError, NotFiniteError, layer_change
from .read import LoraFile, read_lora
from .readers import compatible_loaders

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
    file = read_lora(path)
    match = match_pipeline(file, pipe, ignore_unused=True) if pipe is not None else None
    layers = [report for name in file.layers for report in layer_reports(file, name, match, pipe)]
    report = Report(
        path, file.format, detect_base(file), alpha_source(file, layers), layers, compatible_loaders(file, pipe)
    )
    tool = detect_tool(file)
    report.facts = {"written by": tool} if tool else {}
    report.facts |= {k: v for k, v in file.header.items() if k not in ("format", "lora_adapter_metadata")}
    if file.words:
        report.facts["words"] = ", ".join(file.words)
    report.advice = advice_for(file, report, match)
    return report


@torch.no_grad()
def layer_reports(file: LoraFile, name: str, match: Match | None, pipe: Any) -> list[LayerReport]:
    """What one layer's tensors do; with its base, a layer that is several of the base's is reported as these."""
    method, rank, fault = file.method(name), file.rank(name), file.fault(name)
    place = match.places.get(name) if match else None
    if fault:
        return [LayerReport(name, method, rank, 1.0, norm=None, relative=None, fault=fault)]
    scale = file.scale(name, *((place.part, place.layers[0]) if place else ()))
    modules = [getattr(pipe, place.part).get_submodule(layer) for layer in place.layers] if place else []
    roles = file.roles(name)
    try:
        change = layer_change(roles, scale, frozen_weight(modules, swapped=place.swapped) if place else None)
    except NotFiniteError:
        return [LayerReport(name, method, rank, scale, norm=None, relative=None, fault="not finite")]
    except NeedsWeightError:
        return [LayerReport(name, method, rank, scale, norm=None, relative=None)]
    except UserError as error:
        return [LayerReport(name, method, rank, scale, norm=None, relative=None, fault=str(error))]
    if place is None or len(modules) == 1:
        return [change_report(name, method, rank, scale, change, modules[0] if modules else None)]
    cut = zip(place.layers, modules, own_rows(change, place, modules), strict=True)
    rows = [change_report(f"{place.part}.{ours}", method, rank, scale, own, module) for ours, module, own in cut]
    return [row for row in rows if not row.fault] or rows  # one that was stacked with others and not trained is no news


def change_report(name: str, method: str, rank: int | None, scale: float, change: Change, module: Any) -> LayerReport:
    """A change that could be computed. module: the base's layer, where it is known."""
    norm = change_norm(change)
    weight = float(module.weight.detach().float().norm()) if module is not None else 0.0
    fault = "nothing" if norm == 0 and (change.bias is None or not change.bias.any()) else ""
    return LayerReport(name, method, rank, scale, norm=norm, relative=norm / weight if weight else None, fault=fault)


def change_norm(change: Change) -> float:
    """Frobenius norm of a change of factors or a whole matrix."""
    if change.dense is not None:
        return float(change.dense.norm())
    if change.up is None or change.down is None:
        return 0.0
    # |up down|^2 from r x r products, without the whole matrix.
    return float(((change.up.t() @ change.up) * (change.down @ change.down.t())).sum().clamp(min=0).sqrt())


def alpha_source(file: LoraFile, layers: Sequence[LayerReport]) -> str:
    """Where alpha is said."""
    scales = sorted({round(layer.scale, 6) for layer in layers}) or [1.0]
    shown = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    if any("alpha" in roles for roles in file.layers.values()):
        return f"a tensor in each layer; scale alpha / rank = {shown}"
    if file.scales.parts:
        root = "sqrt(rank)" if any(part.rslora for part in file.scales.parts.values()) else "rank"
        return f"in {'adapter_config.json' if file.format == 'peft' else 'the header'}; scale alpha / {root} = {shown}"
    if file.scales.header_alpha is not None:
        return f"{file.scales.header_key} in the header, {file.scales.header_alpha:g}; scale alpha / rank = {shown}"
    return "not said, so every reader takes scale 1"


def advice_for(file: LoraFile, report: Report, match: Match | None) -> list[str]:
    """What is wrong and what to do."""
    advice = advice_on_layers(report.layers)
    advice += scale_notes(file) + alpha_contradiction(file)
    if match is None and file.unknown_names:
        advice.append(
            f"{len(file.unknown_names)} tensors have names that no tool is known to write, such as {file.unknown_names[0]}."
        )
    if match is None and file.words:
        advice.append(
            f"It brings words of its own: {', '.join(file.words)}; readers that do not know bundle_emb leave them out."
        )
    if match is not None and match.missing:
        advice.append(
            f"{len(match.missing)} layers are not in this base, such as {match.missing[0]}: it was made for another."
        )
    if match is not None:
        advice += match.notes(file)
    if file.format == "diffusers" and said_nothing(file) and any(file.rank(layer) for layer in file.layers):
        advice.append("The header names no alpha. If it was trained with alpha other than rank, its scale is lost.")
    return advice


def alpha_contradiction(file: LoraFile) -> list[str]:
    """What to know where header and tensors say different alphas."""
    said = file.scales.header_alpha
    if said is None:
        return []
    alphas = {alpha for layer in file.layers if (alpha := file.alpha(layer)) is not None}
    if not alphas or any(abs(alpha - said) <= 1e-3 * max(abs(said), 1) for alpha in alphas):
        return []
    shown = ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:3])
    return [
        f"The header says alpha {said:g} ({file.scales.header_key}) and the tensors {shown}: readers follow the tensors, and so do we."
    ]


def said_nothing(file: LoraFile) -> bool:
    """Whether a file says nothing of its scale."""
    alone = not file.scales.parts and file.scales.header_alpha is None
    return alone and not any("alpha" in roles for roles in file.layers.values())


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
