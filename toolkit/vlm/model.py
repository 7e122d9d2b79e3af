"""Vision-language models: found, checked and opened; their parts by name.

`AutoModelForImageTextToText` and `AutoProcessor` do the work. What a family is here for is to know which part is the language
model, which the vision tower, and which the projector between them: adapters go where they are wanted and nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import devices
from ..core.errors import UserError, did_you_mean
from ..core.hub import fetch_snapshot
from ..core.out_of_memory import oom_context
from ..core.paths import assets_folder, is_hub_id
from ..core.quantize import quantize_model
from .chat_tokens import ChatTokens
from .families import FAMILIES, find_family
from .pixel_limits import limit_pixels

EMBEDDED = {"tiny-vlm": "vlm"}  # name -> folder in assets/tiny
EXACT = ("token_weights", "second_per_grid_ts")  # inputs that no half precision may round
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_vision_base(base: str) -> str:
    """The folder of a base: an embedded one by name, a folder, or a hub id (from the local cache, else fetched).

    Raises:
        UserError: when there is none, or its kind is unknown here.
    """
    if base in EMBEDDED:
        return str(assets_folder() / "tiny" / EMBEDDED[base])
    folder = Path(base)
    if not folder.is_dir():
        if not is_hub_id(base):
            raise UserError(f"--base {base} is neither a folder nor a hub id.{did_you_mean(base, EMBEDDED)}")
        folder = Path(fetch_snapshot(base, FILES, f"--base {base}", "Give a folder, or tiny-vlm, which is embedded."))
    check_vision_folder(folder, base)
    return str(folder)


def available_bases() -> list[str]:
    """Bases that need not be fetched: the embedded ones, and those of known kinds in the hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = list(EMBEDDED)
    for file in sorted(Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json")):
        name = file.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        try:
            check_vision_folder(file.parent, name)
        except (UserError, OSError, AttributeError):
            continue
        if name not in found and any(file.parent.glob("*.safetensors")):
            found.append(name)
    return found


def check_vision_folder(folder: Path, base: str) -> None:
    """Raises UserError when the folder holds no vision-language model of a known kind."""
    file = folder / "config.json"
    if not file.is_file():
        more = (
            " It is a diffusers pipeline: use `rankfold train subject`."
            if (folder / "model_index.json").is_file()
            else ""
        )
        raise UserError(f"--base {base} is not a model of transformers: it has no config.json.{more}")
    kind = read_model_type(file, base)
    known = [name for family in FAMILIES for name in family.model_types]
    if find_family(kind) is None:
        raise UserError(
            f"--base {base} is a model of type '{kind}', which cannot be trained yet. Known are {', '.join(known)}; a new kind is one "
            "entry in toolkit/vlm/families.py."
        )
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise UserError(f"--base {base} has no processor: neither processor_config.json nor preprocessor_config.json.")


def read_model_type(file: Path, base: str) -> str:
    """The kind of model that a config.json names.

    Raises:
        UserError: when it is not JSON, or no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--base {base}: config.json is not JSON: {error.msg} at line {error.lineno}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--base {base}: config.json is not text in UTF-8 that holds JSON: is the download whole?"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"--base {base}: config.json holds no object, so it is no model's config: is the download whole?"
        )
    return str(found.get("model_type", ""))


class VisionLanguageModel:
    """A base model and its processor; the model is loaded when it is first asked for."""

    def __init__(
        self,
        folder: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantize: str = "none",
        *,
        template: str | None = None,
        pad_to_square: bool = False,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        video_frames: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        """template: a chat template instead of the base's own; pad_to_square: see ChatTokens; max_pixels, min_pixels: see
        `limit_pixels`; video_frames: see `VideoTokens`; attention: its implementation."""
        self.folder, self.dtype, self.device, self.quantize = folder, dtype, torch.device(device), quantize
        self.attention = attention
        self.config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        family = find_family(self.config["model_type"])
        assert family is not None, "resolve_vision_base refuses unknown kinds"
        self.family = family
        self.processor = load_processor(folder)
        limit_pixels(self.processor, max_pixels, min_pixels)
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
        template = template or getattr(self.processor, "chat_template", None) or family.chat_template
        self.processor.chat_template = template
        self.chat = ChatTokens(
            self.processor,
            end_token_ids(folder, self.processor),
            prefix_attention=family.prefix_attention,
            appended=family.appended,
            pad_to_square=pad_to_square,
            boxes=self.config.get("box_convention", family.boxes),
            video_frames=video_frames,
            takes_video=family.takes_video,
            equal_videos=family.equal_videos,
        )

    @property
    def model(self) -> Any:
        """The model, in eval mode and frozen."""
        if "_model" not in self.__dict__:
            self._model = self.load()
        return self._model

    @oom_context("loading the base")
    def load(self) -> Any:
        """Loads the model."""
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=self.dtype, attn_implementation=self.attention
        )
        if self.quantize != "none":
            model = quantize_model(model, self.quantize, self.dtype)
        return model.to(self.device).requires_grad_(False).eval()

    def to_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors where the model is, images and videos in its dtype."""
        return {
            key: value.to(
                self.device,
                self.dtype if value.is_floating_point() and key not in EXACT else None,
                non_blocking=True,
            )
            for key, value in tensors.items()
        }

    def linear_layers(self, parts: tuple[str, ...]) -> list[str]:
        """Full names of the linear layers of named parts, see PARTS.

        Raises:
            UserError: for a part that has none.
        """
        found: list[str] = []
        for part in parts:
            own = [name for name, module in self.model.named_modules() if self.belongs_to_part(name, module, part)]
            if not own:
                raise UserError(f"--target-parts {part}: {type(self.model).__name__} has no such layers.")
            found += own
        return found

    def language_blocks(self) -> list[nn.Module]:
        """The layers of the language model, which every forward pass goes through, as not every one goes through the tower."""
        language = self.model.get_submodule(self.family.language)
        return [block for child in language.children() if isinstance(child, nn.ModuleList) for block in child]

    def belongs_to_part(self, name: str, module: nn.Module, part: str) -> bool:
        """Whether a module is a linear layer of a part."""
        family = self.family
        if not hasattr(module, "in_features"):
            return False
        if part == "projector":
            return self.in_projector(name)
        where, kind = part.split("-")
        tower = where == "vision"
        root = family.tower if tower else family.language
        ends = getattr(family, f"{'tower' if tower else 'language'}_{kind}")
        own = any(name.endswith(f".{end}") for end in ends) and any(word.isdigit() for word in name.split("."))
        return is_inside(name, root) and own and not (tower and self.in_projector(name))

    def in_projector(self, name: str) -> bool:
        """Whether a module belongs to the projector."""
        return any(is_inside(name, root) for root in self.family.projector)

    def projectors(self) -> list[str]:
        """Names of the modules that make up the projector."""
        found = []
        for root in self.family.projector:
            module = dict(self.model.named_modules()).get(root)
            own = (
                [f"{root}.{name}" for name, _ in module.named_children()]
                if isinstance(module, nn.ModuleList)
                else [root]
            )
            found += own if module is not None else []
        return found

    def part_name(self, name: str) -> str:
        """Which part a layer belongs to, for people."""
        family = self.family
        if self.in_projector(name):
            return "projector"
        if is_inside(name, family.tower):
            return "vision tower"
        return "language model" if is_inside(name, family.language) else "elsewhere"


def check_attention(kind: str) -> None:
    """Raises UserError when an implementation of attention cannot run here."""
    devices.raise_fault(f"--attention {kind}", devices.attention_fault(devices.this_machine(), kind))
    if kind == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(f"--attention {kind} needs the library flash_attn, which is not installed: leave it at sdpa.")


def is_inside(name: str, root: str) -> bool:
    """Whether a module lies under another."""
    return name == root or name.startswith(f"{root}.")


def load_processor(folder: str) -> Any:
    """The base's processor.

    Raises:
        UserError: when it cannot be built, as when a library that it needs is missing.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        raise UserError(
            f"The processor of {folder} needs a library that is not installed: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:
        raise UserError(
            f"The processor of {folder} cannot be built ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Is the folder "
            "whole, and are torchvision and sentencepiece installed, which some processors need?"
        ) from error


def base_name(base: str) -> str:
    """What a base is called in what is written for others: its hub id, or its folder in full."""
    if base in EMBEDDED or Path(base).is_dir():
        return str(Path(resolve_vision_base(base)).resolve())
    return base


def stored_dtype(folder: str) -> torch.dtype:
    """The dtype of a base's weights as they are stored."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts: dict[torch.dtype, int] = {}
    for file in sorted(Path(folder).glob("*.safetensors"))[:1]:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                if part.get_dtype() in names:
                    kind = names[part.get_dtype()]
                    counts[kind] = counts.get(kind, 0) + math.prod(part.get_shape())
    return max(counts, key=lambda kind: counts[kind]) if counts else torch.float32


def end_token_ids(folder: str, processor: Any) -> list[int]:
    """Ids that stop generation: the generation config's, and the tokenizer's end token.

    Raises:
        UserError: when there is none.
    """
    file = Path(folder) / "generation_config.json"
    given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = [given] if isinstance(given, int) else list(given or [])
    own = processor.tokenizer.eos_token_id
    if own is not None and own not in ends:
        ends.append(own)
    if not ends:
        raise UserError(f"The base in {folder} has no end token, so no answer would ever stop.")
    return ends
