"""Krea 2: a flow transformer of single blocks over twelve layers of Qwen 3-VL, with Qwen-Image's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..model import ATTENTION_TARGETS, PromptEmbeds, TrainingDefaults, pack_latents, pad_and_stack, unpack_latents
from ..original_layers import OriginalLayer, Table, expand_table
from .qwen_image import QwenImage

BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
LAYERS = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
ORIGINAL: Table = {
    **{f"{block}.{theirs}": f"{own}.{ours}" for block, own in BLOCKS.items() for theirs, ours in LAYERS.items()},
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}
DISTILLED_SHIFT = 1.15  # mu of the stock pipeline for a base that model_index.json calls distilled, whatever the size


class Krea2(QwenImage):
    """One attention over words and image, with a gate."""

    pipelines = ("Krea2Pipeline",)
    attention_targets = (*ATTENTION_TARGETS, "to_gate")
    training_defaults = TrainingDefaults(
        rank=32, source="layers and rank as Krea's trainer has them, which adapts all linear layers; rate and batch as in ai-toolkit"
    )  # fmt: skip
    guidance_argument = "guidance_scale"
    guidance_off = 0.0
    title = "Krea 2"
    architecture = "krea-2"
    denoiser_classes = ("Krea2Transformer2DModel",)
    layer_marks = (
        r"(txtfusion|text_fusion)_",
        r"(^|_)blocks_\d+_attn_(w[qkvo]|gate)",
        r"transformer_blocks_\d+_attn_to_gate",
    )
    kohya_keeps_original_names = True
    licence = "Krea 2 Community License: read the checkpoint's card."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser)

    @property
    def default_targets(self) -> tuple[str, ...]:
        """All linear layers of all blocks."""
        return (*self.attention_targets, "ff.gate", "ff.up", "ff.down")

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Without the padding between words and template, which nothing attends to: all words are at one place."""
        states, mask = self.text_pipeline().encode_prompt(list(prompts), device=self.device)
        rows = [(row[keep][None], keep[keep][None]) for row, keep in zip(states, mask, strict=True)]
        return pad_and_stack([{"prompt_embeds": row, "prompt_embeds_mask": keep} for row, keep in rows])

    def prompt_limits(self) -> dict[str, int]:
        return {
            "tokenizer": super().prompt_limits()["tokenizer"] - self.pipeline().prompt_template_encode_num_suffix_tokens
        }

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        return self.pipeline().prompt_template_encode_prefix + prompt

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The stock pipeline gives both prompts as many places, so their states are made as long as each other."""
        if isinstance(prompts, dict) and isinstance(negative, dict):
            length = max(one["prompt_embeds"].shape[1] for one in (prompts, negative))
            prompts, negative = lengthen(prompts, length), lengthen(negative, length)
        return super(QwenImage, cls).call_kwargs(prompts, negative, guidance_scale)

    def dynamic_shift(self, tokens: int, config: dict[str, Any]) -> float:
        """The stock pipeline's, whose line ends at more tokens than that of others where the config says nothing."""
        if self.index.get("is_distilled"):
            return DISTILLED_SHIFT
        return super().dynamic_shift(tokens, {"max_image_seq_len": 6400} | config)

    def predict(
        self,
        noisy: torch.Tensor,
        sigmas_B: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        from diffusers import Krea2Pipeline

        height, width = noisy.shape[2:]
        states = prompt_embeds["prompt_embeds"]
        places = Krea2Pipeline.prepare_position_ids(states.shape[1], height // 2, width // 2, noisy.device)
        tokens = self.transformer(
            hidden_states=pack_latents(noisy),
            timestep=sigmas_B,
            encoder_hidden_states=states,
            encoder_attention_mask=prompt_embeds["prompt_embeds_mask"].bool(),
            position_ids=places,
        ).sample
        return unpack_latents(tokens, height, width)


def lengthen(embeds: PromptEmbeds, length: int) -> PromptEmbeds:
    """Prompt embeds (B, L, ...) filled up with what their mask leaves out, to this length."""
    return {
        name: torch.cat([value, value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])], 1)
        for name, value in embeds.items()
    }
