"""ERNIE-Image: a flow transformer of single blocks over Mistral 3, with FLUX.2's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model import DiffusionModel, PromptEmbeds, TrainingDefaults, pad_and_stack
from .flux_2 import decode_patches, normalized_patches
from .z_image import unpad

TIMESTEPS = 1000  # the transformer is told the noise level times this
NORM_EPS = 1e-5  # of the stock pipeline, whatever the autoencoder's config says


class ErnieImage(DiffusionModel):
    """One attention over image and words; prompts keep their own lengths. Its prompt enhancer is left out: prompts are what they say."""

    pipelines = ("ErnieImagePipeline",)
    words_first = False
    words_argument = "text_bth"
    patch_size = 1  # latents are squares of 2 x 2 already
    autoencoders = ("AutoencoderKLFlux2",)
    training_defaults = TrainingDefaults(
        source="rate, rank and batch as in ai-toolkit; guidance as in the stock pipeline"
    )
    title = "ERNIE-Image"
    architecture = "ernie-image"
    denoiser_classes = ("ErnieImageTransformer2DModel",)
    layer_marks = (r"(^|_)layers_\d+_self_attention_to_",)
    licence = "Apache-2.0."

    @property
    def latent_scale(self) -> int:
        return 2 * super().latent_scale

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return normalized_patches(self.vae, pixels, NORM_EPS)

    @classmethod
    def decode_latents(cls, vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return decode_patches(vae, latents_BCHW, NORM_EPS)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """As the stock pipeline's encode_prompt, which lets no gradient through."""
        rows = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, truncation=True).input_ids or [self.tokenizer.bos_token_id or 0]
            said = self.text_encoder(input_ids=torch.tensor([ids], device=self.device), output_hidden_states=True)
            states = said.hidden_states[-2]
            rows.append({"prompt_embeds": states, "mask": states.new_ones(states.shape[:2], dtype=torch.bool)})
        return pad_and_stack(rows)

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """States go in as a list of tensors of their own lengths."""
        given = super().call_kwargs(prompts, negative, guidance_scale)
        for start in ("", "negative_"):
            mask = given.pop(f"{start}mask", None)
            if mask is not None:
                given[f"{start}prompt_embeds"] = unpad(given[f"{start}prompt_embeds"], mask)
        return given

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas_B * TIMESTEPS,
            text_bth=prompt_embeds["prompt_embeds"],
            text_lens=prompt_embeds["mask"].sum(1),
        ).sample
