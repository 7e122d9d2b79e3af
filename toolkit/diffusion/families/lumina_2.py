"""Lumina Image 2: a flow transformer over Gemma 2, with time running from noise to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model import DiffusionModel, PromptEmbeds


class Lumina2(DiffusionModel):
    """One attention over words and image."""

    pipelines = ("Lumina2Pipeline",)
    latent_statistics = ("shift_factor",)
    licence = "Apache-2.0; the text encoder is under the Gemma terms."

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, mask, _, _ = self.text_pipeline().encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        return f"{self.pipeline().system_prompt} <Prompt Start> {prompt}"

    def dynamic_shift(self, tokens: int, config: dict[str, Any]) -> float:
        """The stock pipeline counts the latents' channels instead of their tokens; what the base samples with is what counts here."""
        return super().dynamic_shift(self.latent_channels, config)

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return -self.transformer(
            hidden_states=noisy,
            timestep=1 - sigmas_B,
            encoder_hidden_states=prompt_embeds["prompt_embeds"],
            encoder_attention_mask=prompt_embeds["prompt_attention_mask"],
        ).sample
