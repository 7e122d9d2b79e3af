"""FLUX.1: dev (guidance is distilled into the model) and schnell (few steps, no guidance)."""

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
from ..original_layers import OriginalLayer, Table, attention_rows, expand_table

T5_TOKENS = 512  # that the stock pipeline fills a prompt up to
UNSET_SIDE = 32  # sample_size of an autoencoder for which nobody has said one
TRAINING_GUIDANCE = 1.0  # the distilled guidance that adapters are trained at: at 1 it asks for the plain prediction

INNER, CONTEXT_INNER = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
ORIGINAL: Table = {
    **attention_rows("double_blocks.{}.img_attn", f"{DOUBLE}.attn", INNER, "to_out.0"),
    **attention_rows("double_blocks.{}.txt_attn", f"{DOUBLE}.attn", CONTEXT_INNER, "to_add_out"),
    "double_blocks.{}.img_attn.norm.query_norm": f"{DOUBLE}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": f"{DOUBLE}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": f"{DOUBLE}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": f"{DOUBLE}.attn.norm_added_k",
    "double_blocks.{}.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": f"{DOUBLE}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "double_blocks.{}.img_mod.lin": f"{DOUBLE}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
    "single_blocks.{}.linear1": (*(f"{SINGLE}.attn.{name}" for name in INNER), f"{SINGLE}.proj_mlp"),
    "single_blocks.{}.linear2": f"{SINGLE}.proj_out",
    "single_blocks.{}.norm.query_norm": f"{SINGLE}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": f"{SINGLE}.attn.norm_k",
    "single_blocks.{}.modulation.lin": f"{SINGLE}.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


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
    title = "FLUX.1"
    kohya_keeps_original_names = True
    architecture = "flux-1-dev"
    kohya_version = "flux1"
    denoiser_classes = ("FluxTransformer2DModel",)
    layer_marks = (
        r"double_blocks_\d+_(img|txt)_mod",
        r"single_blocks_\d+_modulation",
        r"single_transformer_blocks_\d+_(norm_linear|proj_mlp)",
        r"double_blocks_\d+_(img|txt)_attn",
        r"single_blocks_\d+_linear",
        r"single_transformer_blocks_\d+_attn_to_[qkv]$",
    )
    licence = "FLUX.1-dev: non-commercial licence of Black Forest Labs; schnell: Apache-2.0."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser, swapped=["final_layer.adaLN_modulation.1"])

    @property
    def native_resolution(self) -> int:
        side = self.part_config("vae").get("sample_size", UNSET_SIDE)
        return 1024 if side == UNSET_SIDE else side

    @classmethod
    def text_kwargs(cls, parts: Any) -> dict[str, Any]:
        """What T5 is given of a prompt: as much as the base's tokenizer says, where that is less than the stock pipeline's own limit."""
        tokenizer = parts.tokenizer_2
        return {"max_sequence_length": min(T5_TOKENS, tokenizer.model_max_length)} if tokenizer else {}

    def prompt_limits(self) -> dict[str, int]:
        return super().prompt_limits() | {"tokenizer_2": self.text_kwargs(self)["max_sequence_length"]}

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        pipe = self.text_pipeline()
        states, pooled, _ = pipe.encode_prompt(list(prompts), None, device=self.device, **self.text_kwargs(pipe))
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The negative prompt is left out: guidance is an input of the model, not a second pass."""
        return super().call_kwargs(prompts, None, guidance_scale)

    def predict(
        self,
        noisy: torch.Tensor,
        sigmas_B: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        height, width = noisy.shape[2:]
        states = prompt_embeds["prompt_embeds"]
        places = [
            image_ids(latents.shape[2] // 2, latents.shape[3] // 2, number)
            for number, latents in enumerate((noisy, *references))
        ]
        distilled = self.transformer.config.guidance_embeds
        tokens = self.transformer(
            hidden_states=torch.cat([pack_latents(latents) for latents in (noisy, *references)], 1),
            timestep=sigmas_B,
            guidance=sigmas_B.new_full((len(noisy),), TRAINING_GUIDANCE, dtype=torch.float32) if distilled else None,
            pooled_projections=prompt_embeds["pooled_prompt_embeds"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=torch.cat(places).to(states),
        ).sample
        return unpack_latents(tokens[:, : height * width // 4], height, width)


def image_ids(height: int, width: int, number: int = 0) -> torch.Tensor:
    """(number, row, column) of each token, (height * width, 3). number: 0 for the image that is made, 1 for its reference."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], -1).reshape(-1, 3)
