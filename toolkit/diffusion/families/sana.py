"""Sana: linear attention over latents of a deep-compression autoencoder, words from Gemma 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model import DiffusionModel, PromptEmbeds

TIMESTEPS = 1000


class Sana(DiffusionModel):
    """Linear self-attention, and cross-attention to Gemma 2."""

    pipelines = ("SanaPipeline",)
    patch_size = 1
    autoencoders = ("AutoencoderDC",)
    licence = "NVIDIA: see the card of the checkpoint; the text encoder is under the Gemma terms."

    @property
    def latent_scale(self) -> int:
        return 2 ** (len(self.part_config("vae")["encoder_block_out_channels"]) - 1)

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This autoencoder has no spread."""
        latents = self.vae.encode(pixels).latent * self.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, mask, _, _ = self.text_pipeline().encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """Images get the size they are asked for, not the nearest one of a list."""
        given = super().call_kwargs(prompts, negative, guidance_scale) | {"use_resolution_binning": False}
        return given | {"negative_prompt": None} if isinstance(negative, dict) else given

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.transformer(
            noisy,
            encoder_hidden_states=prompt_embeds["prompt_embeds"],
            encoder_attention_mask=prompt_embeds["prompt_attention_mask"],
            timestep=sigmas_B * TIMESTEPS * self.transformer.config.timestep_scale,
        ).sample
