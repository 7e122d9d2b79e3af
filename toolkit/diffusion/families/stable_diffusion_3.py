"""Stable Diffusion 3 and 3.5, and the embedded model `tiny-dit`: a flow transformer over two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ...core.errors import UserError
from ..model import JOINT_ATTENTION, PictureModel, Words

TIMESTEPS = 1000  # the transformer is told the noise level times this


class StableDiffusion3(PictureModel):
    """Joint attention over picture and words."""

    pipelines = ("StableDiffusion3Pipeline",)
    text_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attention = JOINT_ATTENTION
    lora_text = ("text_encoder", "text_encoder_2")
    kohya: ClassVar = {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    licence = "Stability AI Community License: free below a revenue limit, derived files carry it."

    @property
    def patch(self) -> int:
        return self.config_of("transformer")["patch_size"]

    def check_side(self, side: int, flag: str) -> None:
        super().check_side(side, flag)
        most = self.config_of("transformer")["pos_embed_max_size"] * self.patch * self.latent_scale
        if side > most:
            raise UserError(f"{flag} {side} is more than this base has positions for: take {most} at most.")

    def text_pipeline(self) -> Any:
        pipe = super().text_pipeline()
        if not self.has("text_encoder_3"):  # zeros stand in its place, as wide as the pipeline's transformer says
            pipe.transformer = SimpleNamespace(config=SimpleNamespace(**self.config_of("transformer")))
        return pipe

    def words(self, prompts: Sequence[str]) -> Words:
        texts = list(prompts)
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(self, noisy: torch.Tensor, levels_B: torch.Tensor, words: Words) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=levels_B * TIMESTEPS,
            encoder_hidden_states=words["prompt_embeds"],
            pooled_projections=words["pooled_prompt_embeds"],
        ).sample
