"""Stable Diffusion XL: two CLIP text encoders, and the size of the picture as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..model import Words
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """UNet with cross-attention to two text encoders, the second one's pooled state, and sizes."""

    pipelines = ("StableDiffusionXLPipeline",)
    text_names = ("text_encoder", "text_encoder_2")
    lora_text = token_text = text_names
    kohya: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    licence = "CreativeML OpenRAIL++-M: use-based restrictions go with every derived file."

    def words(self, prompts: Sequence[str]) -> Words:
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(self, noisy: torch.Tensor, levels_B: torch.Tensor, words: Words) -> torch.Tensor:
        height, width = (side * self.latent_scale for side in noisy.shape[2:])
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)  # original, crop, target
        added = {"text_embeds": words["pooled_prompt_embeds"], "time_ids": sizes}
        return self.unet(noisy, levels_B, encoder_hidden_states=words["prompt_embeds"], added_cond_kwargs=added).sample
