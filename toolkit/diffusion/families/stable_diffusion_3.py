"""Stable Diffusion 3 and 3.5, and the embedded model `tiny-dit`: a flow transformer over two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ...core.errors import UserError
from ..model import JOINT_ATTENTION_TARGETS, DiffusionModel, PromptEmbeds, TrainingDefaults

TIMESTEPS = 1000  # the transformer is told the noise level times this


class StableDiffusion3(DiffusionModel):
    """Joint attention over image and words."""

    pipelines = ("StableDiffusion3Pipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attention_targets = JOINT_ATTENTION_TARGETS
    lora_text_encoders = ("text_encoder", "text_encoder_2")
    kohya_prefixes: ClassVar = {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    latent_statistics = ("shift_factor",)
    training_defaults = TrainingDefaults(
        source="shift as diffusers' train_dreambooth_lora_sd3.py takes it, from the scheduler"
    )
    licence = "Stability AI Community License: free below a revenue limit, derived files carry it."

    @property
    def patch_size(self) -> int:
        return self.part_config("transformer")["patch_size"]

    def check_side(self, side: int, flag: str) -> None:
        super().check_side(side, flag)
        most = self.part_config("transformer")["pos_embed_max_size"] * self.patch_size * self.latent_scale
        if side > most:
            raise UserError(f"{flag} {side} is more than this base has positions for: take {most} at most.")

    def text_pipeline(self) -> Any:
        pipe = super().text_pipeline()
        if not self.has_part("text_encoder_3"):  # zeros stand in its place, as wide as the pipeline's transformer says
            pipe.transformer = SimpleNamespace(config=SimpleNamespace(**self.part_config("transformer")))
        return pipe

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        texts = list(prompts)
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas_B * TIMESTEPS,
            encoder_hidden_states=prompt_embeds["prompt_embeds"],
            pooled_projections=prompt_embeds["pooled_prompt_embeds"],
        ).sample
