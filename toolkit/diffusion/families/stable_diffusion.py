"""Stable Diffusion 1.x and 2.x (epsilon and v), and the embedded model `tiny`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler

from ..model import DiffusionModel, PromptEmbeds, TrainingDefaults


class StableDiffusion(DiffusionModel):
    """UNet with cross-attention to one CLIP text encoder."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    is_flow = False
    patch_size = 1
    lora_text_encoders = inversion_text_encoders = ("text_encoder",)
    kohya_prefixes: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te"}
    training_defaults = TrainingDefaults(
        text_learning_rate=5e-5,
        source="rate as in the README of diffusers' train_dreambooth_lora.py, text encoder half of it as in kohya's guides; bf16, rank 16",
    )
    licence = "CreativeML OpenRAIL-M (1.x) and ++-M (2.x): use-based restrictions go with every derived file."

    def sampling_scheduler(self) -> Any:
        """DDIM: previews need no more than its few steps, whatever the base names."""
        return DDIMScheduler.from_config(DDIMScheduler.load_config(self.path, subfolder="scheduler"))

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _ = self.text_pipeline().encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt_embeds": states}

    def predict(self, noisy: torch.Tensor, timesteps_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.unet(noisy, timesteps_B, encoder_hidden_states=prompt_embeds["prompt_embeds"]).sample
