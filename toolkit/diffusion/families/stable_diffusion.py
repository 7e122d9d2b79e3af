"""Stable Diffusion 1.x and 2.x (epsilon and v), and the embedded model `tiny`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..model import DiffusionModel, PromptEmbeds, TrainingDefaults
from ..original_layers import OriginalLayer

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip

SD2_WIDTH = 1024  # of the prompt states of 2.x
SD2_V_SIDE = 96  # of the latents of 2.x's larger model, which predicts v


class StableDiffusion(DiffusionModel):
    """UNet with cross-attention to one CLIP text encoder."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    words_first = None
    is_flow = False
    patch_size = 1
    lora_text_encoders = inversion_text_encoders = ("text_encoder",)
    kohya_prefixes: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te"}
    training_defaults = TrainingDefaults(
        text_learning_rate=5e-5,
        source="rate as in the README of diffusers' train_dreambooth_lora.py, text encoder half of it as in kohya's guides; bf16, rank 16",
    )
    title = "Stable Diffusion"
    architecture = "stable-diffusion-v1"
    denoiser_classes = ("UNet2DConditionModel",)
    layer_marks = (
        r"(down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)",
        r"mid_block_(attentions|resnets)",
        r"(input|output)_blocks_\d+_\d",
        r"middle_block_\d",
    )
    licence = "CreativeML OpenRAIL-M (1.x) and ++-M (2.x): use-based restrictions go with every derived file."

    @classmethod
    def versions_in_headers(cls, denoiser: Any) -> tuple[str, str]:
        """One class of denoisers is 1.x, 2.x and XL: told apart by what they are conditioned on, and the size they draw."""
        config = denoiser.config
        if config.addition_embed_type == "text_time":
            return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
        if config.cross_attention_dim == SD2_WIDTH:
            return f"stable-diffusion-v2-{'768-v' if config.sample_size == SD2_V_SIDE else '512'}", "sd_v2"
        return cls.architecture, "sd_v1"

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        """The names of Stability's code (SGM), in which kohya writes Stable Diffusion XL: blocks counted through both halves."""
        places = unet_places(denoiser)
        found = {}
        for name, module in denoiser.named_modules():
            if getattr(module, "weight", None) is None:
                continue
            start = next((ours for ours in places if name == ours or name.startswith(f"{ours}.")), None)
            if start is None:
                continue
            inside = name[len(start) :].lstrip(".")
            if ".resnets." in f".{start}":
                theirs = next((key for key, own in RESNET.items() if own == inside), None)
                if theirs is None:
                    continue
                found[f"{places[start]}.{theirs}"] = OriginalLayer((name,))
            else:
                found[f"{places[start]}.{inside}".rstrip(".")] = OriginalLayer((name,))
        return found

    def sampling_scheduler(self) -> Any:
        """DDIM: previews need no more than its few steps, whatever the base names."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(DDIMScheduler.load_config(self.path, subfolder="scheduler"))

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _ = self.text_pipeline().encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt_embeds": states}

    def predict(self, noisy: torch.Tensor, timesteps_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.unet(noisy, timesteps_B, encoder_hidden_states=prompt_embeds["prompt_embeds"]).sample


def unet_places(unet: nn.Module) -> dict[str, str]:
    """Our blocks, samplers and outer layers of a UNet -> where the original keeps them."""
    names = {name for name, _ in unet.named_modules()}
    places = {ours: theirs for theirs, ours in OUTER.items() if ours in names}
    place = 1
    for block in range(len(unet.down_blocks)):  # type: ignore[arg-type]
        start = f"down_blocks.{block}"
        for number in count_from_zero(names, f"{start}.resnets"):
            places[f"{start}.resnets.{number}"] = f"input_blocks.{place}.0"
            places[f"{start}.attentions.{number}"] = f"input_blocks.{place}.1"
            place += 1
        places[f"{start}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += f"{start}.downsamplers.0" in names
    places |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    place = 0
    for block in range(len(unet.up_blocks)):  # type: ignore[arg-type]
        start = f"up_blocks.{block}"
        for number in count_from_zero(names, f"{start}.resnets"):
            places[f"{start}.resnets.{number}"] = f"output_blocks.{place}.0"
            places[f"{start}.attentions.{number}"] = f"output_blocks.{place}.1"
            place += 1
        behind = 2 if f"{start}.attentions" in names else 1
        places[f"{start}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{behind}.conv"
    return places


def count_from_zero(names: set[str], start: str) -> list[int]:
    """0, 1, ... for as long as there is such a layer."""
    number = 0
    while f"{start}.{number}" in names:
        number += 1
    return list(range(number))
