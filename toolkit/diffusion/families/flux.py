"""FLUX.1: dev (guidance is distilled into the model) and schnell (few steps, no guidance)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..model import (
    JOINT_ATTENTION_TARGETS,
    DiffusionModel,
    PromptEmbeds,
    TrainingDefaults,
    pack_latents,
    unpack_latents,
)

TRAINING_GUIDANCE = 1.0  # the distilled guidance that adapters are trained at: at 1 it asks for the plain prediction


class Flux(DiffusionModel):
    """Double blocks (joint attention), then single blocks over words and image in one sequence."""

    pipelines = ("FluxPipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2")
    attention_targets = JOINT_ATTENTION_TARGETS
    lora_text_encoders = inversion_text_encoders = ("text_encoder",)
    kohya_prefixes: ClassVar = {"transformer": "lora_unet", "text_encoder": "lora_te1"}
    latent_statistics = ("shift_factor",)
    training_defaults = TrainingDefaults(
        source="rate, rank, batch as in ai-toolkit; shift by the number of tokens, as sd-scripts' flux_shift"
    )
    licence = "FLUX.1-dev: non-commercial licence of Black Forest Labs; schnell: Apache-2.0."

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, pooled, _ = self.text_pipeline().encode_prompt(list(prompts), None, device=self.device)
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The negative prompt is left out: guidance is an input of the model, not a second pass."""
        return super().call_kwargs(prompts, None, guidance_scale)

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        height, width = noisy.shape[2:]
        states = prompt_embeds["prompt_embeds"]
        distilled = self.transformer.config.guidance_embeds
        tokens = self.transformer(
            hidden_states=pack_latents(noisy),
            timestep=sigmas_B,
            guidance=sigmas_B.new_full((len(noisy),), TRAINING_GUIDANCE, dtype=torch.float32) if distilled else None,
            pooled_projections=prompt_embeds["pooled_prompt_embeds"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=image_ids(height // 2, width // 2).to(states),
        ).sample
        return unpack_latents(tokens, height, width)


def image_ids(height: int, width: int) -> torch.Tensor:
    """(0, row, column) of each token, (height * width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
