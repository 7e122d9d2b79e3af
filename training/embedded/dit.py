"""The embedded flow transformer's training, on the latents that the UNet learns from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...toolkit.diffusion.noise import FlowNoise
from ...toolkit.embedded import tiny_dit
from .loop import BuildTinyConfig, copy_average, fit, load_as_fp32, shuffled_batches
from .unet import encode_all


def train_dit(config: BuildTinyConfig) -> None:
    """Trains the transformer and its second text encoder from scratch on the flow's velocity; writes their moving average.

    The step is compiled, for which torch needs a C++ compiler.
    """
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTokenizer

    latents, _, which = encode_all(config)
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer")
    ids, states, pooled = first_prompt_embeds(config, tokenizer)
    torch.manual_seed(config.seed)  # after the encoders, whose loading draws numbers
    learner = Learner(tiny_dit.make_transformer(), tiny_dit.make_second_encoder(tokenizer)).train()
    average = EMAModel(learner.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    noise, generator = FlowNoise("logit_normal"), torch.Generator().manual_seed(config.seed)
    velocity = torch.compile(learner)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        clean = latents[rows].float()
        words = which[rows].clone()
        words[torch.rand(len(rows), generator=generator) < 0.1] = 0  # the empty prompt, for guidance
        drawn = torch.randn(clean.shape, generator=generator)
        sigmas = torch.cat([noise.sample_timestep(generator, *clean.shape[2:]) for _ in rows])
        pred = velocity(
            noise.add_noise(clean, drawn, sigmas), sigmas, states[words].float(), pooled[words].float(), ids[words]
        )
        return F.mse_loss(pred.float(), noise.target(clean, drawn, sigmas))

    def after(step: int) -> None:
        average.step(learner.parameters())
        if step % 1500 == 0 and step < steps:
            save_pipeline(config, learner, average, config.work / f"dit-{step:05d}")

    steps = config.dit_steps
    batches = shuffled_batches(len(latents), 64, steps, config.seed)
    fit(config, "dit", list(learner.parameters()), batches, loss_of, steps=steps, lr=2e-3, bf16=True, after=after)
    save_pipeline(config, learner, average, config.out / "dit")


T5_TOKENS = 256  # zeros that StableDiffusion3Pipeline puts where T5 would speak


class RepeatedTokenAttention:
    """Stable Diffusion 3's joint attention for words whose last token stands for T5_TOKENS alike ones.

    Alike tokens stay alike through every block, so one of them with log(T5_TOKENS) added to its logits is the same computation
    at a quarter of its price.
    """

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        """Image tokens (B, N, D) and words (B, L, D) -> the same."""
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        image = [split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        words = [split(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        query = torch.cat((attn.norm_q(image[0]), attn.norm_added_q(words[0])), 2)
        key = torch.cat((attn.norm_k(image[1]), attn.norm_added_k(words[1])), 2)
        value = torch.cat((image[2], words[2]), 2)
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        bias[-1] = math.log(T5_TOKENS)
        mixed = F.scaled_dot_product_attention(query, key, value, bias.expand(1, 1, query.shape[2], -1))
        mixed = mixed.transpose(1, 2).flatten(2)
        mine, theirs = mixed.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), 1)
        return attn.to_out[0](mine), theirs if attn.context_pre_only else attn.to_add_out(theirs)


class Learner(nn.Module):
    """What is trained: transformer and second text encoder, put together as StableDiffusion3Pipeline does."""

    def __init__(self, transformer: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.transformer, self.second = transformer, second
        transformer.set_attn_processor(RepeatedTokenAttention())

    def forward(
        self, noisy: torch.Tensor, sigmas_B: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Velocity (B, 24, 8, 8) of noisy latents, from the first encoder's states (B, L, 128) and pooled words (B, 128)."""
        own = self.second(ids, output_hidden_states=True)
        words = torch.cat((states, own.hidden_states[-2].to(states.dtype)), -1)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas_B * 1000,
            encoder_hidden_states=F.pad(words, (0, 0, 0, 1)),
            pooled_projections=torch.cat((pooled, own.text_embeds.to(pooled.dtype)), -1),
            return_dict=False,
        )[0]


def first_encoder(config: BuildTinyConfig) -> Any:
    """The first text encoder, from the parts that the stage clip has left."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel.from_pretrained(config.out / "sd" / "text_encoder", dtype=torch.float32)
    return tiny_dit.make_first_encoder(tower, config.out / "clip" / "open_clip_model.safetensors").eval()


@torch.no_grad()
def first_prompt_embeds(config: BuildTinyConfig, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the distinct captions, numbered as `encode_all` does: tokens (P, 24), states (P, 24, 128) and pooled words (P, 128)."""
    captions = json.loads((config.work / "captions.json").read_text(encoding="utf-8"))
    ids = torch.tensor(tokenizer(["", *sorted(set(captions))], padding="max_length", truncation=True).input_ids)
    encoder, states, pooled = first_encoder(config), [], []
    for rows in ids.split(500):
        said = encoder(rows, output_hidden_states=True)
        states.append(said.hidden_states[-2].half())
        pooled.append(said.text_embeds.half())
    return ids, torch.cat(states), torch.cat(pooled)


def save_pipeline(config: BuildTinyConfig, learner: Learner, average: Any, folder: Path) -> None:
    """Writes the whole StableDiffusion3Pipeline with the averaged weights, in fp16."""
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(config.out / "sd" / "tokenizer")
    shadow = Learner(tiny_dit.make_transformer(), tiny_dit.make_second_encoder(tokenizer))
    copy_average(average, learner, shadow)
    vae = AutoencoderKL.from_pretrained(config.out / "sd" / "vae", dtype=torch.float16)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it to every latent
    pipeline = StableDiffusion3Pipeline(
        transformer=shadow.transformer.half(),
        scheduler=tiny_dit.make_scheduler(),
        vae=vae,
        text_encoder=first_encoder(config).half(),
        tokenizer=tokenizer,
        text_encoder_2=shadow.second.half(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    load_as_fp32(folder / "text_encoder")
    load_as_fp32(folder / "text_encoder_2")
