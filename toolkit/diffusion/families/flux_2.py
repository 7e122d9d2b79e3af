"""FLUX.2 klein: one Qwen 3 text encoder, latents normalised by running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from ..model import JOINT_ATTENTION_TARGETS, DiffusionModel, PromptEmbeds

STEPS = 50  # of the stock pipeline


class Flux2Klein(DiffusionModel):
    """Double blocks, then single blocks whose q, k, v and MLP are one projection."""

    pipelines = ("Flux2KleinPipeline",)
    attention_targets = JOINT_ATTENTION_TARGETS
    patch_size = 1  # latents are squares of 2 x 2 already
    autoencoders = ("AutoencoderKLFlux2",)
    licence = "klein 4B: Apache-2.0; klein 9B: non-commercial licence of Black Forest Labs."

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The single blocks' output projection by its whole name: in double blocks a list of layers is called the same."""
        singles = range(self.part_config("transformer")["num_single_layers"])
        outputs = (f"single_transformer_blocks.{number}.attn.to_out" for number in singles)
        return (*self.attention_targets, "to_qkv_mlp_proj", *outputs)

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
        posterior = self.vae.encode(pixels).latent_dist
        norm = self.vae.bn
        mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        std = std.view(1, -1, 1, 1)
        return (patchify(posterior.mean) - mean) / std, patchify(posterior.std) / std

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _ = self.text_pipeline().encode_prompt(list(prompts), device=self.device)
        return {"prompt_embeds": states}

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The pipeline itself puts the empty prompt against the prompt; it takes another one as states only."""
        return super().call_kwargs(prompts, negative if isinstance(negative, dict) else None, guidance_scale)

    def dynamic_shift(self, tokens: int, config: dict[str, Any]) -> float:
        """The stock pipeline's own fit, for as many steps as it takes by itself."""
        return compute_empirical_mu(tokens, STEPS)

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        b, c, height, width = noisy.shape
        states = prompt_embeds["prompt_embeds"]
        tokens = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=sigmas_B,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=position_ids(1, 1, states.shape[1]).to(states.device).expand(b, -1, -1),
            img_ids=position_ids(height, width, 1).to(states.device).expand(b, -1, -1),
        ).sample
        return tokens.transpose(1, 2).reshape(b, c, height, width)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) with each square of 2 x 2 as channels, (B, 4C, H/2, W/2)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)


def position_ids(height: int, width: int, length: int) -> torch.Tensor:
    """(0, row, column, word) of each token, (height * width * length, 4)."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))
