"""Z-Image: a flow transformer over Qwen 3, with time running from noise to image and one list entry per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model import DiffusionModel, PromptEmbeds, TrainingDefaults, pad_and_stack
from ..original_layers import OriginalLayer, Table, expand_table

ORIGINAL: Table = {
    f"{block}.{theirs}": ours
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for theirs, ours in {
        "attention.qkv": tuple(f"{block}.attention.{name}" for name in ("to_q", "to_k", "to_v")),
        "attention.out": f"{block}.attention.to_out.0",
        "attention.q_norm": f"{block}.attention.norm_q",
        "attention.k_norm": f"{block}.attention.norm_k",
    }.items()
} | {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}


class ZImage(DiffusionModel):
    """One attention over words and image; prompts keep their own lengths."""

    pipelines = ("ZImagePipeline",)
    words_first = False
    token_multiple = 32
    words_argument = "cap_feats"
    latent_statistics = ("shift_factor",)
    training_defaults = TrainingDefaults(
        timestep_shift=2.0, source="shift as in musubi-tuner's guide; rate, rank and batch as in ai-toolkit"
    )
    guidance_off = 0.0
    title = "Z-Image"
    architecture = "z-image"
    denoiser_classes = ("ZImageTransformer2DModel",)
    layer_marks = (
        r"(layers|noise_refiner|context_refiner)_\d+_attention_(to_[qkv]|to_out|qkv|out)",
        r"layers_\d+_adaLN_modulation_0",
    )
    licence = "Apache-2.0. The distilled Turbo loses its few-step skill under training: train the base model."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser)

    @property
    def native_resolution(self) -> int:
        return 1024  # no config says it

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _ = self.text_pipeline().encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        rows = [
            {"prompt_embeds": s[None], "mask": torch.ones(1, len(s), dtype=torch.bool, device=s.device)} for s in states
        ]
        return pad_and_stack(rows)

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """States go in as a list of tensors of their own lengths."""
        return unpad_kwargs(super().call_kwargs(prompts, negative, guidance_scale))

    def predict(self, noisy: torch.Tensor, sigmas_B: torch.Tensor, prompt_embeds: PromptEmbeds) -> torch.Tensor:
        rows = self.transformer(
            list(noisy[:, :, None].unbind()),
            1 - sigmas_B,
            unpad(prompt_embeds["prompt_embeds"], prompt_embeds.get("mask")),
        ).sample
        return -torch.stack(list(rows))[:, :, 0]


def unpad_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a stock pipeline with padded states and their masks as lists of tensors of their own lengths."""
    given = dict(given)
    for start in ("", "negative_"):
        mask = given.pop(f"{start}mask", None)
        if mask is not None:
            given[f"{start}prompt_embeds"] = unpad(given[f"{start}prompt_embeds"], mask)
    return given


def unpad(states: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """States (B, L, width) without what the mask (B, L) leaves out, one tensor per prompt; no mask leaves nothing out."""
    if mask is None:
        return list(states)
    return [row[keep.bool()] for row, keep in zip(states, mask, strict=True)]
