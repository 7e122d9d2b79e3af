"""Stable Diffusion 3 and 3.5, and the embedded model `tiny-dit`: a flow transformer over two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.errors import UserError
from ..model import JOINT_ATTENTION_TARGETS, DiffusionModel, PromptEmbeds, TrainingDefaults
from ..original_layers import OriginalLayer, Table, attention_rows, expand_table

TIMESTEPS = 1000  # the transformer is told the noise level times this

INNER, CONTEXT_INNER, BLOCK = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    "transformer_blocks.{}",
)
ORIGINAL: Table = {
    **attention_rows("joint_blocks.{}.x_block.attn", f"{BLOCK}.attn", INNER, "to_out.0"),
    **attention_rows("joint_blocks.{}.x_block.attn2", f"{BLOCK}.attn2", INNER, "to_out.0"),
    **attention_rows("joint_blocks.{}.context_block.attn", f"{BLOCK}.attn", CONTEXT_INNER, "to_add_out"),
    "joint_blocks.{}.x_block.mlp.fc1": f"{BLOCK}.ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": f"{BLOCK}.ff.net.2",
    "joint_blocks.{}.context_block.mlp.fc1": f"{BLOCK}.ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": f"{BLOCK}.ff_context.net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": f"{BLOCK}.norm1.linear",
    "joint_blocks.{}.context_block.adaLN_modulation.1": f"{BLOCK}.norm1_context.linear",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


class StableDiffusion3(DiffusionModel):
    """Joint attention over image and words."""

    pipelines = ("StableDiffusion3Pipeline",)
    words_first = False
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attention_targets = JOINT_ATTENTION_TARGETS
    lora_text_encoders = ("text_encoder", "text_encoder_2")
    latent_statistics = ("shift_factor",)
    training_defaults = TrainingDefaults(
        source="shift as diffusers' train_dreambooth_lora_sd3.py takes it, from the scheduler"
    )
    kohya_prefixes: ClassVar = {
        "transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
    }  # fmt: skip
    title = "Stable Diffusion 3"
    kohya_keeps_original_names = True
    architecture = "stable-diffusion-3"
    kohya_version = "sd3"
    denoiser_classes = ("SD3Transformer2DModel",)
    layer_marks = (
        r"joint_blocks_\d+_(x|context)_block",
        r"(^|_)transformer_blocks_\d+_(attn_add_q_proj|norm1_context_linear)",
    )
    licence = "Stability AI Community License: free below a revenue limit, derived files carry it."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        """In the last block the modulation of the words, which has no gate there, keeps its halves the other way round."""
        found = expand_table(ORIGINAL, denoiser, swapped=["final_layer.adaLN_modulation.1"])
        last = f"joint_blocks.{len(denoiser.transformer_blocks) - 1}.context_block.adaLN_modulation.1"  # type: ignore[arg-type]
        if last in found:
            found[last] = OriginalLayer(found[last].layers, swapped=True)
        return found

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
