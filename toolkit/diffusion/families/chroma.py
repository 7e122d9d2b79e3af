"""Chroma: FLUX.1 schnell's blocks with T5 alone before them, and guidance by a second pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..model import (
    JOINT_ATTENTION_TARGETS,
    DiffusionModel,
    PromptEmbeds,
    TrainingDefaults,
    pack_latents,
    unpack_latents,
)
from ..original_layers import OriginalLayer, Table, expand_table
from .flux import ORIGINAL as FLUX_ORIGINAL
from .flux import image_ids

APPROXIMATOR = "distilled_guidance_layer"
ORIGINAL: Table = {
    **FLUX_ORIGINAL,  # of which it lacks the modulations
    f"{APPROXIMATOR}.in_proj": f"{APPROXIMATOR}.in_proj",
    f"{APPROXIMATOR}.out_proj": f"{APPROXIMATOR}.out_proj",
    f"{APPROXIMATOR}.layers.{{}}.in_layer": f"{APPROXIMATOR}.layers.{{}}.linear_1",
    f"{APPROXIMATOR}.layers.{{}}.out_layer": f"{APPROXIMATOR}.layers.{{}}.linear_2",
    f"{APPROXIMATOR}.norms.{{}}": f"{APPROXIMATOR}.norms.{{}}",
}


class Chroma(DiffusionModel):
    """Double blocks, then single ones, with one small network that says how all of them are modulated."""

    pipelines = ("ChromaPipeline",)
    attention_targets = JOINT_ATTENTION_TARGETS
    latent_statistics = ("shift_factor",)
    training_defaults = TrainingDefaults(source="rate, rank and batch as of FLUX.1; guidance as in the stock pipeline")
    title = "Chroma"
    kohya_keeps_original_names = True
    kohya_prefixes: ClassVar = {"transformer": "lora_unet"}
    architecture = "chroma"
    denoiser_classes = ("ChromaTransformer2DModel",)
    layer_marks = (rf"{APPROXIMATOR}_",)
    licence = "Apache-2.0."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser)

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _, mask, *_ = self.text_pipeline().encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        height, width = noisy.shape[2:]
        tokens, states = pack_latents(noisy), prompt_embeds["prompt_embeds"]
        mask = prompt_embeds["prompt_attention_mask"].to(states)
        given: dict[str, Any] = {
            "txt_ids": states.new_zeros(states.shape[1], 3),
            "img_ids": image_ids(height // 2, width // 2).to(states),
            "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
        }
        said = self.transformer(hidden_states=tokens, timestep=sigmas_B, encoder_hidden_states=states, **given).sample
        return unpack_latents(said, height, width)
