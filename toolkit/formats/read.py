"""LoRA files of any origin, parsed and checked: which layers they have, by which method, at which scale.

    parse (tensor_file.py, spellings.py) -> check (methods.py, scales.py) -> match a pipeline (match.py) -> changes (source.py)

Nothing is read of a tensor before its shape and dtype are known to be possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.errors import UserError
from .adapter_folder import CONFIG, PARTS, WEIGHTS, read_config
from .methods import check_layer, method_name, method_of
from .scales import Scales, part_config, read_scales
from .spellings import DENOISER, PREFIXES, WORD, split_name
from .tensor_file import TensorFile, TensorInfo, TensorsInMemory


@dataclass
class LoraFile:
    """A file as it says itself."""

    path: Path
    tensors: TensorFile | TensorsInMemory
    format: str
    """diffusers, peft, kohya or lycoris."""
    layers: dict[str, dict[str, str]]
    """Layer (with the file's own prefix) -> role -> the tensor's name."""
    scales: Scales
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    """Words that it brings: word -> how it calls the text encoder -> the tensor's name."""
    unknown_names: list[str] = field(default_factory=list)
    """Names that no tool is known to write."""

    @property
    def header(self) -> dict[str, str]:
        """What the file says of itself."""
        return self.tensors.metadata

    def infos(self, layer: str) -> dict[str, TensorInfo]:
        """Shapes and dtypes of a layer's tensors, by role."""
        return {role: self.tensors.infos[name] for role, name in self.layers[layer].items()}

    def roles(self, layer: str) -> dict[str, torch.Tensor]:
        """A layer's tensors by role, all but alpha, which is in its scale."""
        return {role: self.tensors.load(name) for role, name in self.layers[layer].items() if role != "alpha"}

    def method(self, layer: str) -> str:
        """lora, dora, glora, loha, lokr, full, bias, or the name of what is not read."""
        return method_name(self.layers[layer])

    def fault(self, layer: str) -> str:
        """Half a sentence on what is wrong with a layer's tensors, as far as the header shows it; '' when nothing is."""
        try:
            check_layer(self.infos(layer))
        except UserError as error:
            return str(error)
        return ""

    def rank(self, layer: str) -> int | None:
        """Rank of a layer's factors; None where it has none."""
        try:
            return method_of(self.layers[layer]).rank(self.infos(layer))
        except UserError:
            return None

    def alpha(self, layer: str) -> float | None:
        """The alpha beside a layer's tensors."""
        name = self.layers[layer].get("alpha")
        if name is None or self.tensors.infos[name].size != 1:
            return None
        return float(self.tensors.load(name).to(torch.float32).reshape(()))

    def scale(self, layer: str, part: str = "", name: str = "") -> float:
        """The scale of a layer, see scales.py. part, name: which one of a pipeline it is, where that is known."""
        roles = self.layers[layer]
        rank = self.rank(layer)
        if {"lokr_w1", "lokr_w2"} <= roles.keys():
            rank = None  # in whole factors there is no alpha at work; LyCORIS writes one all the same
        if not part:
            part, _, name = guess_part(layer)
        return self.scales.scale(part, name or layer, rank, self.alpha(layer))


def guess_part(layer: str) -> tuple[str, str, str]:
    """(part, '.', name) of a layer that names its part as pipelines call it; the part is '' otherwise."""
    part, dot, name = layer.partition(".")
    return (part, dot, name) if part in PARTS else ("", "", layer)


def read_lora(path: Path) -> LoraFile:
    """Reads one safetensors file, or the one file of a folder.

    Raises:
        UserError: when there is no such file, it is damaged, or no adapter of a known layout.
    """
    if path.is_dir():
        path = single_file(path)
    return parse_lora(TensorFile(path), path)


def parse_lora(tensors: TensorFile | TensorsInMemory, path: Path) -> LoraFile:
    """What a file's names and header say.

    Raises:
        UserError: when it is no adapter, holds two, or its header cannot be read.
    """
    layers: dict[str, dict[str, str]] = {}
    words: dict[str, dict[str, str]] = {}
    unknown, inner_names = [], set()
    for name in tensors.infos:
        if word := WORD.match(name):
            words.setdefault(word["word"], {})[word["encoder"]] = name
            continue
        found = split_name(name)
        if found is None:
            unknown.append(name)
            continue
        layer, role, inner = found
        inner_names |= {inner} - {""}
        if role in layers.setdefault(layer, {}):
            first = layers[layer][role]
            raise UserError(
                f"{path} holds the same tensor of a layer twice ({first} and {name}): it has several adapters in it"
                f"{' (' + ', '.join(sorted(inner_names)) + ')' if inner_names else ''}; save each as a file of its own."
            )
        layers[layer][role] = name
    if adopted := [name for name in unknown if adopt_ia3(name, layers)]:
        unknown = [name for name in unknown if name not in set(adopted)]
    if not layers and not words:
        raise UserError(describe_foreign(path, tensors.infos))
    format = detect_format(layers, path)
    beside = path.parent / CONFIG
    scales = read_scales(tensors.metadata, path, PARTS)
    if format == "peft" and beside.is_file():
        config = read_config(beside)
        scales = Scales({"": part_config(config, str(beside))})
    return LoraFile(path, tensors, format, layers, scales, words, unknown)


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    """The same of tensors that no file holds yet."""
    return parse_lora(TensorsInMemory(tensors, metadata), Path("memory"))


def adopt_ia3(name: str, layers: dict[str, dict[str, str]]) -> bool:
    """Whether a tensor that ends in .weight belongs to a layer of (IA)3; then it is put there."""
    layer = name.removesuffix(".weight")
    if layer == name or "!(IA)3" not in layers.get(layer, {}):
        return False
    layers[layer]["!(IA)3 | weight"] = name
    return True


def describe_foreign(path: Path, infos: Mapping[str, TensorInfo]) -> str:
    """What a file without any adapter's tensors is, in a sentence."""
    if not infos:
        return f"{path} is not a LoRA file: it holds no tensors."
    starts = {
        "a checkpoint of a whole model": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
        "textual inversion vectors (give them to the pipeline's load_textual_inversion)": (
            "emb_params", "string_to_param", "clip_g", "clip_l",
        ),
    }  # fmt: skip
    kind = next((kind for kind, names in starts.items() if any(name.startswith(names) for name in infos)), "")
    is_kind = f"it is {kind}" if kind else f"none of its {len(infos)} tensors is named as an adapter's"
    return f"{path} is not a LoRA file: {is_kind}, such as {next(iter(infos))}."


def single_file(folder: Path) -> Path:
    """The adapter file of a folder.

    Raises:
        UserError: when it holds none, or several.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob(f"*/{WEIGHTS}"))
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in files) or "none"
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".ckpt"))
        hint = f"; {pickles[0]} is a pickle, which is not opened" if pickles and not files else ""
        raise UserError(f"{folder} must hold one .safetensors file, but holds {found}{hint}; name the file.")
    return files[0]


def detect_format(layers: dict[str, dict[str, str]], path: Path) -> str:
    """Which tool's names these are."""
    if path.name == WEIGHTS or any(layer.startswith("base_model.model.") for layer in layers):
        return "peft"
    kohya = tuple(p for p, parts in PREFIXES.items() if p.endswith("_") and p != "unet_" and parts)
    if any(layer.startswith(kohya) for layer in layers):
        plain = all(set(roles) <= {"down", "up", "alpha", "mid", "dora_scale"} for roles in layers.values())
        return "kohya" if plain else "lycoris"
    if any(layer.startswith(tuple(p for p, parts in PREFIXES.items() if parts == (DENOISER,))) for layer in layers):
        return "comfyui"
    return "diffusers"
