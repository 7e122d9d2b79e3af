"""ERNIE-Image: a flow transformer of single blocks over Mistral 3, with FLUX.2's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model import PromptEmbeds, TrainingDefaults, pad_and_stack
from ..patched_latents import PatchedLatentsModel
from .z_image import unpad_kwargs

TIMESTEPS = 1000  # the transformer is told the noise level times this
NORM_EPS = 1e-5  # of the stock pipeline, whatever the autoencoder's config says


class ErnieImage(PatchedLatentsModel):
    """One attention over image and words; prompts keep their own lengths. Its prompt enhancer is left out: prompts are what they say."""

    pipelines = ("ErnieImagePipeline",)
    words_first = False
    words_argument = "text_bth"
    training_defaults = TrainingDefaults(
        source="rate, rank and batch as in ai-toolkit; guidance as in the stock pipeline"
    )
    title = "ERNIE-Image"
    architecture = "ernie-image"
    denoiser_classes = ("ErnieImageTransformer2DModel",)
    layer_marks = (r"(^|_)layers_\d+_self_attention_to_",)
    licence = "Apache-2.0."

    @classmethod
    def norm_eps(cls, vae: Any) -> float:
        return NORM_EPS

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
        return unpad_kwargs(super().call_kwargs(prompts, negative, guidance_scale))

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas_B * TIMESTEPS,
            text_bth=prompt_embeds["prompt_embeds"],
            text_lens=prompt_embeds["mask"].sum(1),
        ).sample
