"""Qwen-Image: a flow transformer over Qwen 2.5-VL, and an autoencoder made for video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model import (
    JOINT_ATTENTION_TARGETS,
    DiffusionModel,
    PromptEmbeds,
    TrainingDefaults,
    pack_latents,
    unpack_latents,
)


class QwenImage(DiffusionModel):
    """Joint attention over image and words."""

    pipelines = ("QwenImagePipeline",)
    attention_targets = JOINT_ATTENTION_TARGETS
    autoencoders = ("AutoencoderKLQwenImage",)
    latent_statistics = ("latents_mean", "latents_std")
    training_defaults = TrainingDefaults(
        source="rate and rank as in ai-toolkit; the scheduler's shift, about 2 at 1024 px (musubi-tuner: 2.2)"
    )
    guidance_argument = "true_cfg_scale"
    title = "Qwen-Image"
    architecture = "Qwen-Image"
    denoiser_classes = ("QwenImageTransformer2DModel",)
    layer_marks = (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)",)
    licence = "Apache-2.0."

    @property
    def latent_scale(self) -> int:
        return 2 ** len(self.part_config("vae")["temperal_downsample"])

    @property
    def latent_channels(self) -> int:
        return self.part_config("vae")["z_dim"]

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior, config = self.vae.encode(pixels[:, :, None]).latent_dist, self.vae.config  # one frame
        mean = torch.tensor(config.latents_mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=pixels.device).view(1, -1, 1, 1)
        return (posterior.mean[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std

    @classmethod
    def decode_latents(cls, vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        mean, std = (
            latents_BCHW.new_tensor(x).view(1, -1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode((latents_BCHW * std + mean).to(vae.dtype)[:, :, None]).sample[:, :, 0]

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, mask = self.text_pipeline().encode_prompt(list(prompts), device=self.device)
        mask = states.new_ones(states.shape[:2], dtype=torch.long) if mask is None else mask
        return {"prompt_embeds": states, "prompt_embeds_mask": mask}

    def prompt_limits(self) -> dict[str, int]:
        return {"tokenizer": super().prompt_limits()["tokenizer"] + self.pipeline().prompt_template_encode_start_idx}

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        return self.pipeline().prompt_template_encode.format(prompt)

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """Guidance is a second pass here, under a name of its own."""
        given = super().call_kwargs(prompts, negative if guidance_scale > 1 else None, guidance_scale)
        return given | {"guidance_scale": None, "true_cfg_scale": guidance_scale}

    def predict(
        self,
        noisy: torch.Tensor,
        sigmas_B: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        height, width = noisy.shape[2:]
        shapes = [(1, latents.shape[2] // 2, latents.shape[3] // 2) for latents in (noisy, *references)]
        tokens = self.transformer(
            hidden_states=torch.cat([pack_latents(latents) for latents in (noisy, *references)], 1),
            timestep=sigmas_B,
            guidance=None,
            encoder_hidden_states=prompt_embeds["prompt_embeds"],
            encoder_hidden_states_mask=prompt_embeds["prompt_embeds_mask"],
            img_shapes=[shapes] * len(noisy),
        ).sample[:, : height * width // 4]
        return unpack_latents(tokens, height, width)
