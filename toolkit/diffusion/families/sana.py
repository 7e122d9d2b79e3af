"""Sana: linear attention over latents of a deep-compression autoencoder, words from Gemma 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..model import DiffusionModel, PromptEmbeds
from ..original_layers import OriginalLayer, Table, expand_table

ORIGINAL: Table = {
    "blocks.{}.attn.qkv": tuple(f"transformer_blocks.{{}}.attn1.{name}" for name in ("to_q", "to_k", "to_v")),
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.cross_attn.q_linear": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross_attn.kv_linear": ("transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_v"),
    "blocks.{}.cross_attn.proj": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.mlp.inverted_conv.conv": "transformer_blocks.{}.ff.conv_inverted",
    "blocks.{}.mlp.depth_conv.conv": "transformer_blocks.{}.ff.conv_depth",
    "blocks.{}.mlp.point_conv.conv": "transformer_blocks.{}.ff.conv_point",
}

TIMESTEPS = 1000


class Sana(DiffusionModel):
    """Linear self-attention, and cross-attention to Gemma 2."""

    pipelines = ("SanaPipeline",)
    words_first = None
    patch_size = 1
    autoencoders = ("AutoencoderDC",)
    title = "Sana"
    kohya_prefixes: ClassVar = {}  # neither kohya's scripts nor musubi train it
    architecture = "sana"
    denoiser_classes = ("SanaTransformer2DModel",)
    layer_marks = (
        r"transformer_blocks_\d+_ff_conv_(inverted|depth|point)",
        r"(^|_)blocks_\d+_cross_attn_kv_linear",
        r"^transformer_transformer_blocks_\d+_attn[12]_to_[qkv]$",
    )
    licence = "NVIDIA: see the card of the checkpoint; the text encoder is under the Gemma terms."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser)

    @property
    def latent_scale(self) -> int:
        return 2 ** (len(self.part_config("vae")["encoder_block_out_channels"]) - 1)

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, H, W) -> latents, and a spread of 0: this autoencoder has none."""
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
