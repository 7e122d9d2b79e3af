"""Stable Diffusion XL: two CLIP text encoders, and the size of the image as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..model import PromptEmbeds, TrainingDefaults
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """UNet with cross-attention to two text encoders, the second one's pooled state, and sizes."""

    pipelines = ("StableDiffusionXLPipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_text_encoders = inversion_text_encoders = text_encoder_names
    kohya_prefixes: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    block_presets: ClassVar = {  # B-LoRA (Frenkel et al. 2024, arXiv 2403.14572), section 4
        "subject": r"up_blocks\.0\.attentions\.0\.",
        "style": r"up_blocks\.0\.attentions\.1\.",
    }
    latent_statistics = ("latents_mean", "latents_std")
    training_defaults = TrainingDefaults(
        text_learning_rate=1e-5,
        source="rate as in diffusers' train_dreambooth_lora_sdxl.py, text encoders as in sd-scripts, batch 1 and rank 16 as in ai-toolkit",
    )
    title = "Stable Diffusion XL"
    licence = "CreativeML OpenRAIL++-M: use-based restrictions go with every derived file."

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(self, noisy: torch.Tensor, timesteps_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        height, width = (side * self.latent_scale for side in noisy.shape[2:])
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)  # original, crop, target
        added = {"text_embeds": prompt_embeds["pooled_prompt_embeds"], "time_ids": sizes}
        return self.unet(
            noisy, timesteps_B, encoder_hidden_states=prompt_embeds["prompt_embeds"], added_cond_kwargs=added
        ).sample
