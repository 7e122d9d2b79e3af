"""LoRA files of any origin, read back: diffusers, PEFT, kohya, LyCORIS and ComfyUI names.

One table says how each tool ends its tensors' names; what stands before the ending is the layer. Each layer's tensors become
one Change of the frozen weight, with that tool's own convention for alpha.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..adapters.change import Change
from ..core.errors import UserError
from .native import PARTS, WEIGHTS
from .original_names import split_fused_layers
from .write import kohya_name

# part -> how files of kohya's kind begin the names of its layers
KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
# ending -> the tensor's role. Longer endings stand before those they contain.
ENDINGS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
    ".diff_b": "bias",
    ".diff": "diff",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
} | {f".{name}": name for name in (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "oft_blocks", "oft_diag", "w_norm", "b_norm",
)}  # fmt: skip
METHODS = {"diff": "full", "a1": "glora", "hada_w1_a": "loha", "oft_blocks": "oft", "oft_diag": "oft", "w_norm": "norm"}
REQUIRED_ROLES = {
    "lora": ("down", "up"),
    "dora": ("down", "up", "magnitude"),
    "glora": ("a1", "a2", "b1", "b2"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "full": ("diff",),
}
Roles = dict[str, torch.Tensor]


@dataclass
class LoraFile:
    """A file as it says itself."""

    path: Path
    format: str
    """diffusers, peft, kohya or lycoris."""
    header: dict[str, str]
    layers: dict[str, Roles]
    """Layer (with the file's own prefix) -> role -> tensor."""
    unknown_names: list[str] = field(default_factory=list)
    """Names that no tool is known to write."""

    def method(self, layer: str) -> str:
        """lora, dora, glora, loha, lokr, oft, full or norm."""
        roles = self.layers[layer]
        if any(role.startswith("lokr") for role in roles):
            return "lokr"
        for role, method in METHODS.items():
            if role in roles:
                return method
        return "dora" if "magnitude" in roles else "lora"

    def rank(self, layer: str) -> int | None:
        """Rank of a layer's factors."""
        roles = self.layers[layer]
        for role, dim in (("down", 0), ("a2", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0)):
            if role in roles:
                return roles[role].shape[dim]
        return None

    def scale(self, layer: str) -> float:
        """alpha / rank by the file's convention; 1 when the file says nothing."""
        rank = self.rank(layer)
        if rank is None:
            return 1.0
        if "alpha" in self.layers[layer]:
            return float(self.layers[layer]["alpha"]) / rank
        alpha = self.alpha_in_header(layer)
        return 1.0 if alpha is None else alpha / rank

    def alpha_in_header(self, layer: str) -> float | None:
        """alpha of a layer by diffusers' or PEFT's config."""
        config = self.config()
        part, _, name = layer.partition(".")
        mine = {k.removeprefix(f"{part}."): v for k, v in config.items() if k.startswith(f"{part}.")} or config
        patterns = mine.get("alpha_pattern") or {}
        for pattern, alpha in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name or layer):
                return float(alpha)
        return float(mine["lora_alpha"]) if mine.get("lora_alpha") else None

    def config(self) -> dict[str, Any]:
        """The config that diffusers writes into the header, or PEFT beside the file."""
        beside = self.path.parent / "adapter_config.json"
        if self.format == "peft" and beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        return json.loads(self.header.get("lora_adapter_metadata", "{}"))


def read_lora(path: Path) -> LoraFile:
    """Reads one safetensors file, or the one file of a folder.

    Raises:
        UserError: when there is no such file, it is damaged, or no adapter of a known layout.
    """
    if path.is_dir():
        path = single_file(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupted ({error}); copy or download it again.") from error
    layers: dict[str, Roles] = {}
    unknown = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            unknown.append(name)
        else:
            layers.setdefault(name.removesuffix(ending), {})[ENDINGS[ending]] = tensor
    if not layers:
        raise UserError(f"{path} is not a LoRA file: none of its {len(tensors)} tensors is named as an adapter's.")
    return LoraFile(path, detect_format(layers, path), header, layers, unknown)


def single_file(folder: Path) -> Path:
    """The adapter file of a folder.

    Raises:
        UserError: when it holds none, or several.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob(f"*/{WEIGHTS}"))
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in files) or "none"
        raise UserError(f"{folder} must hold one .safetensors file, but holds {found}; name the file.")
    return files[0]


def detect_format(layers: dict[str, Roles], path: Path) -> str:
    """Which tool's names these are."""
    first = next(iter(layers))
    if first.startswith("base_model.model.") or path.name == WEIGHTS:
        return "peft"
    if first.startswith(("lora_", "lycoris_")):
        plain = all(set(roles) <= {"down", "up", "alpha", "mid", "magnitude"} for roles in layers.values())
        return "kohya" if plain else "lycoris"
    return "diffusers"


# ---------------------------------------------------------------------------------------------- tensors to changes


def layer_change(file: LoraFile, layer: str, weight: torch.Tensor | None = None) -> Change:
    """The change that a layer's tensors ask for; weight (out, in * kernel) is the frozen one, which glora and dora need.

    Raises:
        UserError: when tensors are missing, or the method cannot be read.
    """
    method, scale = file.method(layer), file.scale(layer)
    t = {role: tensor.float() for role, tensor in file.layers[layer].items()}
    missing = [role for role in REQUIRED_ROLES.get(method, ()) if role not in t]
    if missing:
        raise UserError(f"{file.path}: {layer} lacks {', '.join(missing)}; the file is incomplete.")
    bias = t.get("bias")
    if method == "full":
        return Change(dense=t["diff"].flatten(1), bias=bias)
    if method == "loha" and "hada_t1" not in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return Change(dense=product * scale, bias=bias)
    if method == "lokr" and "lokr_t2" not in t:
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"].flatten(1)
        scale = 1.0 if "lokr_w1" in t and "lokr_w2" in t else scale
        return Change(dense=torch.kron(w1, w2.flatten(1)) * scale, bias=bias)
    if method == "glora":
        plain = Change(down=t["b2"].flatten(1), up=t["b1"].flatten(1) * scale, bias=bias)
        if not t["a1"].any() or not t["a2"].any():
            return plain
        frozen = require_weight(file, layer, weight)
        return plain + Change(down=t["a2"].flatten(1), up=frozen @ t["a1"].flatten(1) * scale)
    if method in ("lora", "dora") and "mid" not in t:
        plain = Change(down=t["down"].flatten(1), up=t["up"].flatten(1) * scale, bias=bias)
        if method == "lora":
            return plain
        frozen = require_weight(file, layer, weight)
        turned = frozen + plain.delta_weight(frozen)
        # PEFT's magnitudes are those of rows (out); kohya's dora_scale (1, in) those of columns.
        by_row = t["magnitude"].numel() == len(frozen) and t["magnitude"].shape[0] == len(frozen)
        dim, shape = (1, (-1, 1)) if by_row else (0, (1, -1))
        factor = t["magnitude"].view(shape) / turned.norm(dim=dim, keepdim=True)
        return Change(dense=turned * factor - frozen, bias=bias)
    raise UserError(f"{file.path}: {layer} is of a kind ({method}) that rankfold does not read.")


def require_weight(file: LoraFile, layer: str, weight: torch.Tensor | None) -> torch.Tensor:
    """The frozen weight in fp32.

    Raises:
        UserError: when it was not given.
    """
    if weight is None:
        raise UserError(
            f"{file.path}: the change of {layer} depends on the base model's weight; name the base with --base."
        )
    return weight.float()


# ---------------------------------------------------------------------------------------------- into a pipeline


def match_pipeline(file: LoraFile, pipe: Any) -> LoraFile:
    """The file with the layers that only the original code has put as the pipeline's own, see original_names.py."""
    return replace(file, layers=split_fused_layers(file.layers, pipe))


def locate_layers(file: LoraFile, pipe: Any) -> dict[str, tuple[str, str, nn.Module]]:
    """Layer in the file -> (part, layer name, the frozen layer) in a pipeline; layers that it does not have are left out."""
    places: dict[str, tuple[str, str, nn.Module]] = {}
    for part in PARTS:
        for name, module in named_modules_of(pipe, part):
            if not hasattr(module, "weight"):
                continue
            place = (part, name, module)
            for spelled in layer_spellings(part, name):
                places.setdefault(spelled, place)
    return {layer: places[layer] for layer in file.layers if layer in places}


def named_modules_of(pipe: Any, part: str) -> list[tuple[str, nn.Module]]:
    """A part's modules by name; none when the pipeline has no such part."""
    model = getattr(pipe, part, None)
    return list(model.named_modules()) if isinstance(model, nn.Module) else []


def layer_spellings(part: str, name: str) -> tuple[str, ...]:
    """The ways in which files name a layer."""
    names = [f"{part}.{name}", f"base_model.model.{name}", f"lycoris_{name.replace('.', '_')}"]
    names += [kohya_name(prefix, name) for prefix in KOHYA.get(part, ())]
    if part.startswith("text_encoder"):
        names.append(f"{part}.text_model.{name}")
    return tuple(names)


@torch.no_grad()
def apply_to_pipeline(file: LoraFile, pipe: Any) -> dict[str, dict[str, Change]]:
    """Adds the file's changes to a pipeline's weights; returns them by part and layer.

    Raises:
        UserError: when no layer of the file is in the pipeline, or shapes differ.
    """
    file = match_pipeline(file, pipe)
    places = locate_layers(file, pipe)
    if not places:
        raise UserError(f"{file.path} was made for another base model: none of its layers is in this one.")
    changes: dict[str, dict[str, Change]] = {}
    for layer, (part, name, module) in places.items():
        weight = module.weight
        frozen = weight.detach().float().flatten(1)
        try:
            change = layer_change(file, layer, frozen)
            delta = change.delta_weight(frozen)
        except RuntimeError as error:
            shape = tuple(weight.shape)
            raise UserError(
                f"{file.path} was made for another base model: {name} has the shape {shape} here."
            ) from error
        weight += delta.view(weight.shape).to(weight.dtype)
        if change.bias is not None:
            module.bias += change.bias.to(weight.dtype)  # type: ignore[operator]
        changes.setdefault(part, {})[name] = change
    return changes
