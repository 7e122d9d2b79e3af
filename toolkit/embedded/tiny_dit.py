"""The embedded flow transformer `tiny-dit`: Stable Diffusion 3's architecture in small, without its T5.

An ordinary folder: `StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)` loads it with no code
from here. Its autoencoder is the
embedded UNet's, its first text encoder the text tower of the embedded open_clip model; the second is small and learns along.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import tiny_sd as tiny

WIDTH = 128
HEADS = 4
LAYERS = 5
SECOND_TEXT_WIDTH = 24
LATENT_SIDE = 8
LARGEST_SIDE = 12  # latent pixels: images of up to 96 px


def make_transformer() -> SD3Transformer2DModel:
    """Five joint blocks, one token per latent pixel; every block begins as the identity (Peebles and Xie 2022, adaLN-Zero)."""
    words = tiny.TEXT_WIDTH + SECOND_TEXT_WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=1,
        in_channels=tiny.LATENT_CHANNELS,
        out_channels=tiny.LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=words,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=words,
        pos_embed_max_size=LARGEST_SIDE,
        qk_norm="rms_norm",
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_first_encoder(encoder: CLIPTextModel, clip_weights: Path) -> CLIPTextModelWithProjection:
    """The embedded text encoder together with the projection of the open_clip model it comes from."""
    projected = CLIPTextModelWithProjection(encoder.config)
    projected.text_model.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        projected.text_projection.weight.copy_(load_file(clip_weights)["text_projection"].T)
    return projected


def make_second_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A narrow text encoder that is trained with the transformer."""
    return CLIPTextModelWithProjection(tiny.text_config(tokenizer, SECOND_TEXT_WIDTH, 2))


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths, steps evenly spaced: small images need no shift."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)
