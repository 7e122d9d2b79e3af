"""Lumina Image 2: a flow transformer over Gemma 2, with time running from noise to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model import DiffusionModel, PromptEmbeds
from ..original_layers import OriginalLayer, Table, expand_table

ORIGINAL: Table = {
    f"{block}.{theirs}": ours
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for theirs, ours in {
        "attention.qkv": tuple(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "attention.out": f"{block}.attn.to_out.0",
        "attention.q_norm": f"{block}.attn.norm_q",
        "attention.k_norm": f"{block}.attn.norm_k",
        "feed_forward.w1": f"{block}.feed_forward.linear_1",
        "feed_forward.w2": f"{block}.feed_forward.linear_2",
        "feed_forward.w3": f"{block}.feed_forward.linear_3",
        "adaLN_modulation.1": f"{block}.norm1.linear",
    }.items()
} | {
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}


class Lumina2(DiffusionModel):
    """One attention over words and image."""

    pipelines = ("Lumina2Pipeline",)
    latent_statistics = ("shift_factor",)
    title = "Lumina Image 2"
    kohya_keeps_original_names = True
    architecture = "lumina-2"
    kohya_version = "lumina2"
    denoiser_classes = ("Lumina2Transformer2DModel",)
    layer_marks = (
        r"(layers|refiner)_\d+_attn_to_[qkv]$",
        r"feed_forward_linear_[123]",
        r"(layers|noise_refiner)_\d+_adaLN_modulation_1",
    )
    licence = "Apache-2.0; the text encoder is under the Gemma terms."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser)

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
