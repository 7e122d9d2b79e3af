"""Lumina Image 2: a flow transformer over Gemma 2, with time running from noise to picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model import PictureModel, Words


class Lumina2(PictureModel):
    """One attention over words and picture."""

    pipelines = ("Lumina2Pipeline",)
    licence = "Apache-2.0; the text encoder is under the Gemma terms."

    def words(self, prompts: Sequence[str]) -> Words:
        states, mask, _, _ = self.text_pipeline().encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    def predict(self, noisy: torch.Tensor, levels_B: torch.Tensor, words: Words) -> torch.Tensor:
        return -self.transformer(
            hidden_states=noisy,
            timestep=1 - levels_B,
            encoder_hidden_states=words["prompt_embeds"],
            encoder_attention_mask=words["prompt_attention_mask"],
        ).sample
