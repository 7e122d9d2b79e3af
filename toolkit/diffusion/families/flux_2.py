"""FLUX.2: dev (Mistral 3 reads the words, guidance is distilled into the model) and klein (Qwen 3, guidance is a second pass)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...core.errors import UserError
from ..model import JOINT_ATTENTION_TARGETS, PromptEmbeds
from ..original_layers import OriginalLayer, Table, attention_rows, expand_table
from ..patched_latents import PatchedLatentsModel

DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
EMBED = "time_guidance_embed"
ORIGINAL: Table = {
    **attention_rows("double_blocks.{}.img_attn", f"{DOUBLE}.attn", ("to_q", "to_k", "to_v"), "to_out.0"),
    **attention_rows(
        "double_blocks.{}.txt_attn", f"{DOUBLE}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"
    ),
    "double_blocks.{}.img_mlp.0": f"{DOUBLE}.ff.linear_in",
    "double_blocks.{}.img_mlp.2": f"{DOUBLE}.ff.linear_out",
    "double_blocks.{}.txt_mlp.0": f"{DOUBLE}.ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": f"{DOUBLE}.ff_context.linear_out",
    "single_blocks.{}.linear1": f"{SINGLE}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": f"{SINGLE}.attn.to_out",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{EMBED}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{EMBED}.timestep_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBED}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBED}.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

STEPS = 50  # of the stock pipeline
PROMPT_TOKENS = 512  # that the stock pipelines fill a prompt up to
TRAINING_GUIDANCE = 1.0  # the distilled guidance that adapters are trained at: at 1 it asks for the plain prediction
MIN_REFERENCE, MAX_SHAPE = 64, 8  # pixels, and long side to short, of references
REFERENCE_STEP = (
    10  # from the image to its first reference, and from each to the next, in the first number of a token's place
)


class Flux2(PatchedLatentsModel):
    """FLUX.2 dev: double blocks, then single blocks whose q, k, v and MLP are one projection."""

    pipelines = ("Flux2Pipeline",)
    attention_targets = JOINT_ATTENTION_TARGETS
    max_references = 10  # the stock pipeline has no limit
    title = "FLUX.2"
    kohya_keeps_original_names = True
    architecture = "flux-2"
    denoiser_classes = ("Flux2Transformer2DModel",)
    layer_marks = (r"attn_to_qkv_mlp_proj", r"(double|single)_stream_modulation")
    licence = "Non-commercial licence of Black Forest Labs."

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        return expand_table(ORIGINAL, denoiser, swapped=["final_layer.adaLN_modulation.1"])

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The single blocks' output projection by its whole name: in double blocks a list of layers is called the same."""
        singles = range(self.part_config("transformer")["num_single_layers"])
        outputs = (f"single_transformer_blocks.{number}.attn.to_out" for number in singles)
        return (*self.attention_targets, "to_qkv_mlp_proj", *outputs)

    @classmethod
    def spatial_latents(cls, pipe: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (B, H * W, C) row by row, as (B, C, H, W)."""
        sides = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
        return latents.transpose(1, 2).unflatten(2, tuple(sides))

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        states, _ = self.text_pipeline().encode_prompt(list(prompts), device=self.device)
        return {"prompt_embeds": states}

    def prompt_limits(self) -> dict[str, int]:
        return {"tokenizer": PROMPT_TOKENS}

    def fill_template(self, tokenizer: str, prompt: str) -> str:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        (messages,) = format_input([prompt], SYSTEM_MESSAGE)
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    @classmethod
    def call_kwargs(
        cls, prompts: Sequence[str] | PromptEmbeds, negative: Sequence[str] | PromptEmbeds | None, guidance_scale: float
    ) -> dict[str, Any]:
        """The negative prompt is left out: guidance is an input of the model, not a second pass."""
        return super().call_kwargs(prompts, None, guidance_scale)

    @classmethod
    def check_references(cls, sizes: Sequence[tuple[int, int]]) -> None:
        """The stock pipeline's own limits."""
        super().check_references(sizes)
        for width, height in sizes:
            if min(width, height) < MIN_REFERENCE or max(width, height) > MAX_SHAPE * min(width, height):
                raise UserError(
                    f"A reference image would be {width} x {height} pixels, and FLUX.2 takes sides of {MIN_REFERENCE} and more, and none "
                    f"that is {MAX_SHAPE} times as long as the other."
                )

    def dynamic_shift(self, tokens: int, config: dict[str, Any]) -> float:
        """The stock pipeline's own fit, for as many steps as it takes by itself."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(tokens, STEPS)

    def predict(
        self,
        noisy: torch.Tensor,
        sigmas_B: torch.Tensor,
        prompt_embeds: PromptEmbeds,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        b, c, height, width = noisy.shape
        states = prompt_embeds["prompt_embeds"]
        distilled = self.transformer.config.guidance_embeds
        places = [position_ids(height, width, 1)]
        places += [
            position_ids(*latents.shape[2:], 1, number * REFERENCE_STEP) for number, latents in enumerate(references, 1)
        ]
        tokens = self.transformer(
            hidden_states=torch.cat([latents.flatten(2).transpose(1, 2) for latents in (noisy, *references)], 1),
            timestep=sigmas_B,
            guidance=sigmas_B.new_full((b,), TRAINING_GUIDANCE, dtype=torch.float32) if distilled else None,
            encoder_hidden_states=states,
            txt_ids=position_ids(1, 1, states.shape[1]).to(states.device).expand(b, -1, -1),
            img_ids=torch.cat(places).to(states.device).expand(b, -1, -1),
        ).sample[:, : height * width]
        return tokens.transpose(1, 2).reshape(b, c, height, width)


class Flux2Klein(Flux2):
    """FLUX.2 klein: smaller, with Qwen 3 before it."""

    pipelines = ("Flux2KleinPipeline",)
    title = "FLUX.2 klein"
    layer_marks = ()  # its files name the layers that FLUX.2's do
    licence = "klein 4B: Apache-2.0; klein 9B: non-commercial licence of Black Forest Labs."

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
        given = negative if isinstance(negative, dict) else None
        return super(Flux2, cls).call_kwargs(prompts, given, guidance_scale)


def position_ids(height: int, width: int, length: int, time: int = 0) -> torch.Tensor:
    """(time, row, column, word) of each token, (height * width * length, 4)."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(length))
