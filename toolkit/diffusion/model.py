"""An image model's parts behind one face for training: encode images, encode prompts, predict.

A family (a file of its own in this folder) says only what is different. Everything else is the stock pipeline's: its parts are
loaded by its own classes, prompts are encoded by its own encode_prompt, images are made by its own __call__.

diffusers is imported where it is used: facts of the families are asked for by those who only look at a file.

PromptEmbeds: an encoded prompt, as a dict from the name of the pipeline's argument (prompt_embeds,
pooled_prompt_embeds, ...) to a tensor (B, ...). Shapes: B batch, C H W latents, L tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..core.errors import UserError
from ..core.out_of_memory import oom_context
from ..core.quantize import quantize_model
from .original_layers import OriginalLayer

if TYPE_CHECKING:
    from .noise import Noise

PromptEmbeds = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
UNUSED_PARTS = ("safety_checker", "image_encoder", "feature_extractor", "pe", "pe_tokenizer")
"""What pipelines are built without: what judges images, conditions on others, or writes prompts anew."""
TEXT_TARGETS = {  # by what a text encoder's layers are called
    "CLIP": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "T5": ("q", "k", "v", "o"),
    "": ("q_proj", "k_proj", "v_proj", "o_proj"),  # Qwen, Gemma, Llama
}


@dataclass(frozen=True)
class TrainingDefaults:
    """Settings that a practitioner would start from with a family; docs/defaults.md has them in one table."""

    learning_rate: float = 1e-4
    text_learning_rate: float = 1e-5
    batch_size: int = 1
    rank: int = 16
    timestep_shift: float | Literal["auto"] = "auto"
    """Of flow models; auto: the shift that the base samples with."""
    preview_steps: int = 25
    guidance_scale: float | None = None
    """None: the stock pipeline's own."""
    source: str = "rank, batch and rate as in ai-toolkit's examples; guidance as in the stock pipeline"
    """Where the figures are from."""


class DiffusionModel:
    """A base model of one family; its parts are loaded when they are first asked for, as attributes (unet, vae, ...)."""

    pipelines: ClassVar[tuple[str, ...]]
    """Classes in model_index.json that this family is."""
    denoiser_name: ClassVar[str] = "transformer"
    """The part that adapters go on first."""
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Text encoders."""
    attention_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS
    """The denoiser's attention layers."""
    is_flow: ClassVar[bool] = True
    """Whether it is a flow model; otherwise its scheduler has discrete timesteps."""
    patch_size: int = 2
    """Latent pixels on a side of one token: what the latents must be divisible by."""
    inversion_text_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that the stock pipeline's load_textual_inversion gives new words."""
    lora_text_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders whose LoRA the stock pipeline's load_lora_weights reads."""
    autoencoders: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    """Classes of the autoencoder that latents are made with."""
    latent_statistics: ClassVar[tuple[str, ...]] = ()
    """Fields of the autoencoder's config that the stock pipeline decodes by, beside scaling_factor."""
    training_defaults: ClassVar[TrainingDefaults] = TrainingDefaults()
    """What training starts from where a user says nothing."""
    block_presets: ClassVar[dict[str, str]] = {}
    """Blocks by what they are known to hold: name -> regular expression on the names of the denoiser's layers."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The argument of the stock pipeline that guidance is."""
    guidance_off: ClassVar[float] = 1.0
    """The guidance at which the stock pipeline draws without any."""
    kohya_prefixes: ClassVar[dict[str, str]] = {"transformer": "lora_unet"}
    """How kohya's files, and musubi's, begin the names of each part's layers; a part without one has no such name."""
    kohya_keeps_original_names: ClassVar[bool] = False
    """Whether kohya's and musubi's files name the denoiser's layers as `original_layers` does; otherwise as diffusers does."""
    title: ClassVar[str] = ""
    """What people call the family."""
    architecture: ClassVar[str] = ""
    """Its name in ModelSpec headers."""
    kohya_version: ClassVar[str] = ""
    """Its ss_base_model_version in the headers of kohya's files; '' where kohya's tools have none, and the architecture stands there."""
    denoiser_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers that its denoiser is."""
    layer_marks: ClassVar[tuple[str, ...]] = ()
    """Regular expressions for names of layers (with _ for each .) by which a file of this family is told from others'."""
    max_references: ClassVar[int] = 0
    """How many reference images the stock pipeline takes for one image."""
    min_references: ClassVar[int] = 0
    """How many it cannot do without."""
    prompts_see_references: ClassVar[bool] = False
    """Whether prompts are encoded with the references beside them, which `encode_prompts` then takes as a second argument."""
    max_images_at_once: ClassVar[int] = 8
    """How many images the stock pipeline draws together."""
    words_first: ClassVar[bool | None] = True
    """Whether the denoiser has words and image in one sequence, words first (True) or last (False); None: it has cross-attention."""
    token_multiple: ClassVar[int] = 1
    """The denoiser fills words and image up to a multiple of so many tokens each."""
    words_argument: ClassVar[str] = "encoder_hidden_states"
    """The argument of the denoiser that the encoded words are."""
    licence: ClassVar[str] = ""
    """What to know before giving results away."""

    def __init__(
        self, path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", quantize: str = "none"
    ) -> None:
        self.path, self.dtype, self.device, self.quantize = path, dtype, torch.device(device), quantize
        self.index: dict[str, Any] = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
        self.loaded: dict[str, Any] = {}
        self.text_pipe: Any = None

    # -------------------------------------------------------------------------- parts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.__dict__.get("index", {}):
            raise AttributeError(name)
        if name not in self.loaded:
            with oom_context(f"loading the base's {name}"):
                self.loaded[name] = self.load(name)
        return self.loaded[name]

    @property
    def parts(self) -> list[str]:
        """Names of the parts that this base has."""
        return [name for name, value in self.index.items() if is_part(value) and value[0]]

    def has_part(self, name: str) -> bool:
        """Whether this base has a part of this name."""
        return bool((self.index.get(name) or [None])[0])

    def load(self, name: str, before_quantizing: Callable[[nn.Module], None] = lambda part: None) -> Any:
        """A part as its own class loads it; weights frozen, in eval mode, the autoencoder in fp32: it overflows in fp16.

        before_quantizing: called with the part while its weights are whole.
        """
        library, kind = self.index[name]
        own = getattr(importlib.import_module(library), kind)
        if not issubclass(own, nn.Module):
            return own.from_pretrained(self.path, subfolder=name)
        if self.device.type == "meta":
            return build_on_meta(own, Path(self.path) / name).to(self.dtype).requires_grad_(False).eval()
        dtype, variant = torch.float32 if name == "vae" else self.dtype, self.variant(name)
        part = own.from_pretrained(self.path, subfolder=name, dtype=dtype, variant=variant)
        before_quantizing(part)
        if self.quantize != "none" and name != "vae":
            part = quantize_model(part, self.quantize, self.dtype)
        return part.to(self.device).requires_grad_(False).eval()

    def variant(self, name: str) -> str | None:
        """The variant that a part's weights have to be loaded as, such as fp16, where there are no others."""
        return weights_variant(Path(self.path) / name)

    @property
    def pipeline_variant(self) -> str | None:
        """The variant that the stock pipeline has to be loaded as; parts without it are loaded as they are."""
        return next((found for name in self.parts if (found := self.variant(name))), None)

    @property
    def denoiser_bytes(self) -> int:
        """Size of the denoiser's weights as they are on disk."""
        folder = Path(self.path) / self.denoiser_name
        return sum(file.stat().st_size for file in folder.iterdir() if WEIGHT_FILE.fullmatch(file.name))

    @classmethod
    def default_guidance(cls) -> float:
        """The guidance of previews where nobody says another: the family's, or what the stock pipeline draws with."""
        if cls.training_defaults.guidance_scale is not None:
            return cls.training_defaults.guidance_scale
        call = inspect.signature(diffusers_class(cls.pipelines[0]).__call__).parameters
        return float(call[cls.guidance_argument].default)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return getattr(self, self.denoiser_name)

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Where adapters go when nobody says otherwise."""
        return self.attention_targets

    @classmethod
    def versions_in_headers(cls, denoiser: nn.Module) -> tuple[str, str]:
        """The architecture of a denoiser in ModelSpec headers, and in kohya's, by which readers tell which bases an adapter is for."""
        return cls.architecture, cls.kohya_version or cls.architecture

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        """The denoiser's layers by the names that the original code gives them; {} where it gives them diffusers' own."""
        return {}

    def text_encoders(self) -> list[str]:
        """The text encoders this base has."""
        return [name for name in self.text_encoder_names if self.has_part(name)]

    def text_targets(self, name: str) -> tuple[str, ...]:
        """The attention layers of a text encoder."""
        kind = self.index[name][1]
        return next(targets for start, targets in TEXT_TARGETS.items() if kind.startswith(start))

    def release(self, *, text: bool = True) -> None:
        """Lets the autoencoder, and by choice the text encoders, leave memory, as soon as no pipeline holds them."""
        for name in ("vae", *(self.text_encoder_names if text else ())):
            self.loaded.pop(name, None)
        self.text_pipe = None if text else self.text_pipe

    def pipeline(self, *names: str) -> Any:
        """The stock pipeline around these very parts; of the large ones only those that are named, the rest None."""
        kind = diffusers_class(self.index["_class_name"])
        large = {self.denoiser_name, "vae", *self.text_encoder_names}
        given: dict[str, Any] = {}
        for name, value in self.index.items():
            if name.startswith("_"):
                continue
            if not is_part(value):
                given[name] = value
            elif name in UNUSED_PARTS:
                given[name] = None
            elif name == "scheduler":
                given[name] = self.sampling_scheduler()
            else:
                wanted = self.has_part(name) and (name in names or name not in large)
                given[name] = getattr(self, name) if wanted else None
        if "requires_safety_checker" in given:
            given["requires_safety_checker"] = False
        pipe = kind(**given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def excluded_parts(self) -> dict[str, None]:
        """Parts that a pipeline is loaded without: what judges or conditions on other images, and what this base lacks."""
        named = [name for name, value in self.index.items() if is_part(value)]
        return {name: None for name in named if name in UNUSED_PARTS or not self.has_part(name)}

    def sampling_scheduler(self) -> Any:
        """The scheduler that images are made with when nobody asks for another: the base's own."""
        return self.load("scheduler")

    def fingerprint(self, *names: str) -> str:
        """A hash of parts' files, so that a cache never outlives the weights it was made with."""
        digest = hashlib.sha256()
        for name in names:
            for file in sorted((Path(self.path) / name).iterdir()):
                if file.is_file():
                    digest.update(file.name.encode())
                    with file.open("rb") as opened:
                        for block in iter(lambda: opened.read(1 << 22), b""):
                            digest.update(block)
        return digest.hexdigest()

    # -------------------------------------------------------------------------- images

    def part_config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """A part's config."""
        return json.loads((Path(self.path) / name / file).read_text(encoding="utf-8"))

    @property
    def latent_scale(self) -> int:
        """Pixels on a side of one latent pixel."""
        return 2 ** (len(self.part_config("vae")["block_out_channels"]) - 1)

    @property
    def native_resolution(self) -> int:
        """Side of the images the model was made for, pixels."""
        return self.part_config(self.denoiser_name)["sample_size"] * self.latent_scale

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, as the denoiser is given them by `predict`."""
        return self.part_config("vae")["latent_channels"]

    def check_side(self, side: int, flag: str) -> None:
        """Raises UserError when images of this side, pixels, cannot be made into whole latents; 0 is the base's own side."""
        unit = self.latent_scale * self.patch_size
        if side % unit:
            near = max(unit, round(side / unit) * unit)
            kind = self.index["_class_name"]
            raise UserError(f"{flag} {side} cannot be divided by {unit}, as a {kind} needs it: take {near}.")

    def check_steps(self, steps: int, flag: str) -> None:
        """Raises UserError for more denoising steps than there are timesteps. flag: the option that gave them."""
        most = self.part_config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
        if steps > most:
            raise UserError(
                f"{flag} {steps}: this base has {most} timesteps, so take at most as many steps; 20 to 50 are usual."
            )

    @oom_context("encoding an image")
    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """RGB image -> mean and std (C, H/f, W/f) of its latents, scaled as the denoiser wants them."""
        from torchvision.transforms.functional import pil_to_tensor

        pixels = pil_to_tensor(image).float()[None] / 127.5 - 1
        mean, std = self.encode_pixels(pixels.to(self.device))
        return {"mean": mean[0].cpu(), "std": std[0].cpu()}

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, H, W) in -1..1 -> mean and std of the latents, each (B, C, H/f, W/f)."""
        posterior = self.vae.encode(pixels).latent_dist
        shift, scale = self.latent_shift_and_scale(self.vae.config, pixels)
        return (posterior.mean - shift) * scale, posterior.std * scale

    @classmethod
    def latent_shift_and_scale(cls, config: Any, like: torch.Tensor) -> tuple[Any, Any]:
        """What an autoencoder's latents are shifted and multiplied by for the denoiser: numbers, or (1, C, 1, 1) as `like` is."""
        if "latents_mean" in cls.latent_statistics and config.latents_mean is not None:
            shift, spread = (like.new_tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
        else:
            shift, spread = config.shift_factor if "shift_factor" in cls.latent_statistics else 0.0, 1.0
        return shift, config.scaling_factor / spread

    @classmethod
    def decode_latents(cls, vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser has them -> pixels (B, 3, H * f, W * f) in -1..1: the inverse of `encode_pixels`."""
        shift, scale = cls.latent_shift_and_scale(vae.config, latents_BCHW)
        return vae.decode((latents_BCHW / scale + shift).to(vae.dtype)).sample

    @classmethod
    def spatial_latents(cls, pipe: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What a stock pipeline works on, (B, C, H, W) or packed (B, H/2 * W/2, 4C), as (B, C, H, W). height, width: pixels."""
        if latents.dim() == 4:
            return latents
        sides = (2 * (side // (2 * pipe.vae_scale_factor)) for side in (height, width))
        return unpack_latents(latents, *sides)

    # -------------------------------------------------------------------------- prompts

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The prompts' embeds; with a gradient where a text encoder is trained."""
        raise NotImplementedError

    def blank_embeds(self, prompt: str, references: Sequence[Image.Image]) -> PromptEmbeds:
        """Zeros in the shape of a prompt's embeds (1, ...), of families whose prompts see references; the text encoder is not asked."""
        raise NotImplementedError

    def prompt_limits(self) -> dict[str, int]:
        """Name of each tokenizer -> tokens of a prompt that its encoder is given, marks and template included."""
        pipeline = diffusers_class(self.index["_class_name"])
        longest = inspect.signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
        names = [name for name in self.index if name.startswith("tokenizer") and self.has_part(name)]
        own = {name: int(getattr(self, name).model_max_length) for name in names}
        return {
            name: own[name] if longest is None or self.index[name][1].startswith("CLIP") else longest.default
            for name in names
        }

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        """A prompt as the stock pipeline gives it to this tokenizer."""
        return prompt

    def text_pipeline(self) -> Any:
        """The stock pipeline with its text encoders alone."""
        self.text_pipe = self.text_pipe or self.pipeline(*self.text_encoder_names)
        return self.text_pipe

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The arguments of the stock pipeline's __call__ for prompts (texts or embeds) and guidance."""
        given: dict[str, Any] = {"guidance_scale": guidance_scale}
        given |= prompts if isinstance(prompts, dict) else {"prompt": list(prompts)}
        if isinstance(negative, dict):
            given |= {f"negative_{name}": value for name, value in negative.items()}
        elif negative is not None:
            given["negative_prompt"] = list(negative)
        return given

    @classmethod
    def text_kwargs(cls, parts: Any) -> dict[str, Any]:
        """The arguments of the stock pipeline's __call__ and encode_prompt for how much of a prompt is read. parts: has the tokenizers."""
        return {}

    @classmethod
    def check_references(cls, sizes: Sequence[tuple[int, int]]) -> None:
        """Raises UserError for more or fewer references than the family takes, or of a size, (width, height), that it does not take."""
        if len(sizes) < cls.min_references:
            raise UserError(
                f"{cls.title} makes images from others: give {cls.min_references} to {cls.max_references} references for each (--reference "
                "where an image is made, --references where pairs are learned), or take another base."
            )
        if len(sizes) > cls.max_references:
            given = "1 reference image is" if len(sizes) == 1 else f"{len(sizes)} reference images are"
            cure = f"at most {cls.max_references}: leave some out" if cls.max_references else "none: leave them out"
            raise UserError(f"{given} given, and {cls.title} takes {cure}, or take another base.")

    @classmethod
    def own_reference_size(cls, size: tuple[int, int]) -> tuple[int, int] | None:
        """The size that the stock pipeline itself scales a reference of this (width, height) to; None where it takes it as it is given."""
        return None

    @classmethod
    def image_kwargs(cls, references: Sequence[Image.Image], width: int, height: int) -> dict[str, Any]:
        """The arguments of the stock pipeline's __call__ for the size of an image and the references that it is made from.

        Raises:
            UserError: as `check_references` does.
        """
        cls.check_references([image.size for image in references])
        return {"width": width, "height": height} | ({"image": list(references)} if references else {})

    # -------------------------------------------------------------------------- noise and prediction

    def noise(self, sampling: str = "logit_normal", shift: float | Literal["auto"] = 1.0) -> Noise:
        """The family's noise convention. shift: of flow models; auto: the one that the base samples images of each size with."""
        from .noise import DiscreteNoise, FlowNoise

        if self.is_flow:
            return FlowNoise(sampling, self.sampling_shift if shift == "auto" else lambda height, width: shift)
        scheduler = diffusers_class("DDPMScheduler")
        return DiscreteNoise(scheduler.from_config(scheduler.load_config(self.path, subfolder="scheduler")))

    def sampling_shift(self, height: int, width: int) -> float:
        """The shift that the stock pipeline samples latents of this size with: one value, or by the number of tokens.

        By tokens: exp(mu), mu on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
        """
        config = self.part_config("scheduler", "scheduler_config.json")
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        mu = self.dynamic_shift(height * width // self.patch_size**2, config)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def dynamic_shift(self, tokens: int, config: dict[str, Any]) -> float:
        """mu for this number of tokens, by the scheduler's config."""
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (tokens - few) / (many - few)

    def predict(self, noisy: torch.Tensor, timesteps_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        """The denoiser's prediction for noisy latents (B, C, H, W) at these timesteps (sigmas for flow models).

        Families with `max_references` take a fourth argument: latents (B, C, h, w) of each reference, seen beside and not predicted.
        """
        raise NotImplementedError


WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""Weights of a part; with a variant in its name, as in model.fp16.safetensors."""


def is_part(value: Any) -> bool:
    """Whether an entry of model_index.json names a part, by library and class (None for one that is left out); others are settings."""
    return isinstance(value, list) and len(value) == 2 and all(one is None or isinstance(one, str) for one in value)


def weights_variant(folder: Path) -> str | None:
    """The variant of a folder's weights (fp16, bf16, ...) where it holds no plain ones; None where it does, or holds no weights."""
    if not folder.is_dir():
        return None
    found = [match[1] for file in sorted(folder.iterdir()) if (match := WEIGHT_FILE.fullmatch(file.name))]
    return found[0] if found and None not in found else None


def has_weights(folder: Path) -> bool:
    """Whether a part's folder holds weights, of whatever variant."""
    return any(WEIGHT_FILE.fullmatch(file.name) for file in folder.iterdir())


def diffusers_class(name: str) -> Any:
    """A class of diffusers, which is imported when it is first needed."""
    return getattr(importlib.import_module("diffusers"), name)


def build_on_meta(kind: Any, folder: Path) -> nn.Module:
    """A part built from its config on the meta device: shapes without numbers."""
    with torch.device("meta"):
        if issubclass(kind, diffusers_class("ModelMixin")):
            return kind.from_config(kind.load_config(folder))  # type: ignore[return-value, attr-defined]
        return kind(kind.config_class.from_pretrained(folder))


def pad_and_stack(rows: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Prompt embeds (1, L, ...) of single prompts as one batch; shorter ones are filled up with zeros, which masks leave out."""
    batch: PromptEmbeds = {}
    for name in rows[0]:
        tensors = [row[name][0] for row in rows]
        longest = max(len(tensor) for tensor in tensors)
        batch[name] = torch.stack(
            [F.pad(t, (0, 0) * (t.dim() - 1) + (0, longest - len(t))) if len(t) < longest else t for t in tensors]
        )
    return batch


def pack_latents(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as tokens (B, H/2 * W/2, 4C), each a square of 2 x 2."""
    b, c, h, w = latents_BCHW.shape
    return latents_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens_BLD: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack_latents`, (B, D / 4, height, width)."""
    b, _, c = tokens_BLD.shape
    return (
        tokens_BLD.view(b, height // 2, width // 2, c // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(b, c // 4, height, width)
    )
