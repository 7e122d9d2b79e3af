"""Base models for picture generation: found, and checked before anything of them is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..errors import UserError, nearest
from .base import PictureModel
from .flux import Flux
from .flux_2 import Flux2Klein
from .lumina_2 import Lumina2
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .tiny import assets
from .z_image import ZImage

FAMILIES: tuple[type[PictureModel], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein, Sana, QwenImage, Lumina2, ZImage,
)  # fmt: skip
EMBEDDED = {"tiny": "tiny/sd", "tiny-dit": "tiny/dit"}


def resolve_base(base: str) -> str:
    """The folder or hub id behind --base, checked as far as possible without loading a weight.

    Raises:
        UserError: for a folder that is no pipeline, or a hub id that can be neither found in the cache nor fetched.
    """
    if base in EMBEDDED:
        folder = assets() / EMBEDDED[base]
        if not (folder / "model_index.json").is_file():
            raise UserError(f"The embedded model is missing from {folder}; build it with: rankfold build-tiny")
        return str(folder)
    if Path(base).is_dir():
        check_pipeline_folder(Path(base))
        return base
    if Path(base).exists() or base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise UserError(
            f"--base {base} is neither a pipeline folder nor a hub id (name/model). The embedded model is 'tiny'."
        )
    return fetch(base)


def check_pipeline_folder(folder: Path) -> None:
    """Raises UserError when the folder is no whole pipeline of a family that can be trained."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--base {folder} is not a diffusers pipeline: it has no model_index.json.")
    try:
        parts = json.loads(index.read_text())
        kind = parts["_class_name"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"--base {folder}: model_index.json names no pipeline class.") from error
    family = family_named(kind)
    if family is None:
        known = [name for one in FAMILIES for name in one.pipelines]
        raise UserError(
            f"--base {folder} is a {kind}, which cannot be trained yet.{nearest(kind, known)} Known are {', '.join(known)}; a "
            "new family is one small file in toolkit/models (see docs/families.md)."
        )
    needed = [family.denoiser_name, "vae", "scheduler"]
    needed += [name for name, value in parts.items() if name.startswith(("text_encoder", "tokenizer")) and value[0]]
    for part in needed:
        if not (folder / part).is_dir():
            raise UserError(f"--base {folder} is not whole: the folder {part}/ is missing.")


def fetch(hub_id: str) -> str:
    """The local snapshot of a hub id, fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=["model_index.json", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"],
            ignore_patterns=["*.fp16.*", "*.non_ema.*"],
        )
    except GatedRepoError as error:
        raise UserError(
            f"--base {hub_id} is gated: accept its terms on its page of the hub, log in with `hf auth login`, and try again."
        ) from error
    except Exception as error:
        raise UserError(
            f"--base {hub_id} is not in the local cache and could not be fetched ({type(error).__name__}). "
            "Check the network and the spelling, give a local folder, or use the embedded model: --base tiny"
        ) from error
    check_pipeline_folder(Path(folder))
    return folder


def family_named(pipeline: str) -> type[PictureModel] | None:
    """The family of a pipeline class."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def open_model(
    path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", quantize: str = "none"
) -> PictureModel:
    """The base model in a folder that `resolve_base` gave; nothing of it is loaded yet."""
    family = family_named(json.loads((Path(path) / "model_index.json").read_text())["_class_name"])
    assert family is not None, "resolve_base refuses pipelines of no family"
    return family(path, dtype, device, quantize)


def cache_folder() -> Path:
    """Where latents, prompt states and class pictures are kept: $RANKFOLD_CACHE or ~/.cache/rankfold."""
    return Path(os.environ.get("RANKFOLD_CACHE", Path.home() / ".cache" / "rankfold"))
