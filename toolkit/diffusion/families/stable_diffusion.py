"""Stable Diffusion 1.x and 2.x (epsilon and v), and the embedded model `tiny`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler

from ..model import PictureModel, Words


class StableDiffusion(PictureModel):
    """UNet with cross-attention to one CLIP text encoder."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    flow = False
    patch = 1
    lora_text = token_text = ("text_encoder",)
    kohya: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te"}
    licence = "CreativeML OpenRAIL-M (1.x) and ++-M (2.x): use-based restrictions go with every derived file."

    def scheduler_for_pictures(self) -> Any:
        """DDIM: previews need no more than its few steps, whatever the base names."""
        return DDIMScheduler.from_config(DDIMScheduler.load_config(self.path, subfolder="scheduler"))

    def words(self, prompts: Sequence[str]) -> Words:
        states, _ = self.text_pipeline().encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt_embeds": states}

    def predict(self, noisy: torch.Tensor, levels_B: torch.Tensor, words: Words) -> torch.Tensor:
        return self.unet(noisy, levels_B, encoder_hidden_states=words["prompt_embeds"]).sample
