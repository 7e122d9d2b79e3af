"""Base models for picture generation: found, checked before they are loaded, and given one face for training.

The face: encode pictures, encode prompts, predict. Everything else of a pipeline stays stock diffusers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError
from .tiny import assets

EMBEDDED = {"tiny": "tiny/sd"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """Raises UserError when the folder is not a Stable Diffusion pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--base {folder} is not a diffusers pipeline: it has no model_index.json.")
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"--base {folder}: model_index.json names no pipeline class.") from error
    if kind != "StableDiffusionPipeline":
        raise UserError(
            f"--base {folder} is a {kind}; only StableDiffusionPipeline (SD 1.x, 2.x) can be trained so far."
        )
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"--base {folder} is not whole: the folder {part}/ is missing.")


def fetch(hub_id: str) -> str:
    """The local snapshot of a hub id, fetched if need be."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            hub_id, allow_patterns=["*.json", "*.txt", "*.model", "*/*.safetensors", "*/*.json", "*/*.txt"]
        )
    except Exception as error:
        raise UserError(
            f"--base {hub_id} is not in the local cache and could not be fetched ({type(error).__name__}). "
            "Check the network and the spelling, give a local folder, or use the embedded model: --base tiny"
        ) from error


@dataclass
class DiffusionModel:
    """A Stable Diffusion base (SD 1.x, 2.x, the embedded model), its parts loaded as they are needed."""

    path: str
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.unet: UNet2DConditionModel = self._part(UNet2DConditionModel, "unet")
        self.scheduler = DDPMScheduler.from_config(DDPMScheduler.load_config(self.path, subfolder="scheduler"))
        self._vae: Any = None
        self._text_encoder: Any = None
        self._tokenizer: Any = None

    def _part(self, kind: Any, name: str, dtype: torch.dtype | None = None) -> Any:
        part = kind.from_pretrained(self.path, subfolder=name, dtype=dtype or self.dtype)
        return part.to(self.device).requires_grad_(False).eval()

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, in fp32: it overflows in fp16."""
        if self._vae is None:
            self._vae = self._part(AutoencoderKL, "vae", torch.float32)
        return self._vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder."""
        if self._text_encoder is None:
            self._text_encoder = self._part(CLIPTextModel, "text_encoder")
        return self._text_encoder

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer")
        return self._tokenizer

    def release(self, *, text_encoder: bool = True) -> None:
        """Lets the autoencoder, and by choice the text encoder, leave memory."""
        self._vae = None
        if text_encoder:
            self._text_encoder = None
        gc.collect()

    @property
    def native_resolution(self) -> int:
        """Side of the pictures the model was made for, pixels."""
        config = json.loads((Path(self.path) / "vae" / "config.json").read_text())
        scale = 2 ** (len(config["block_out_channels"]) - 1)
        return self.unet.config.sample_size * scale

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """RGB picture -> mean and std (C, H/f, W/f) of its latents, scaled as the denoiser wants them."""
        pixels = pil_to_tensor(picture).float()[None] / 127.5 - 1
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        scale = self.vae.config.scaling_factor
        return {"mean": (posterior.mean[0] * scale).cpu(), "std": (posterior.std[0] * scale).cpu()}

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """Token ids (B, length)."""
        return torch.tensor(self.tokenizer(prompts, padding="max_length", truncation=True).input_ids)

    def encode_tokens(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Prompt states (B, L, width)."""
        return self.text_encoder(ids_BL.to(self.device)).last_hidden_state

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Prompt states (B, L, width), without gradient."""
        return self.encode_tokens(self.tokens(prompts))

    def pipeline(self, *, with_text: bool = True) -> StableDiffusionPipeline:
        """A stock pipeline around these very parts, with the base model's own scheduler."""
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder if with_text else None,
            tokenizer=self.tokenizer if with_text else None,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(self.path, subfolder="scheduler")),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def fingerprint(self, part: str) -> str:
        """A hash of a part's files, so that a cache never outlives the weights it was made with."""
        digest = hashlib.sha256()
        for file in sorted((Path(self.path) / part).iterdir()):
            if file.suffix in (".json", ".safetensors", ".txt"):
                digest.update(file.name.encode())
                with file.open("rb") as opened:
                    for block in iter(lambda: opened.read(1 << 22), b""):
                        digest.update(block)
        return digest.hexdigest()


def cache_folder() -> Path:
    """Where latents, prompt states and class pictures are kept: $RANKFOLD_CACHE or ~/.cache/rankfold."""
    return Path(os.environ.get("RANKFOLD_CACHE", Path.home() / ".cache" / "rankfold"))
