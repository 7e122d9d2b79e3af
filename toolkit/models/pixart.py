"""PixArt-Sigma: an epsilon transformer over T5."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import PictureModel, Words


class PixArtSigma(PictureModel):
    """Self-attention, and cross-attention to T5."""

    pipelines = ("PixArtSigmaPipeline",)
    flow = False
    licence = "CreativeML OpenRAIL++-M: use-based restrictions go with every derived file."

    def words(self, prompts: Sequence[str]) -> Words:
        states, mask, _, _ = self.text_pipeline().encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    def predict(self, noisy: torch.Tensor, levels_B: torch.Tensor, words: Words) -> torch.Tensor:
        guess = self.transformer(
            noisy,
            encoder_hidden_states=words["prompt_embeds"],
            encoder_attention_mask=words["prompt_attention_mask"],
            timestep=levels_B,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return guess[:, : noisy.shape[1]]  # the rest is its variance
