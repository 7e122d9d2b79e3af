"""The embedded models: their architecture, their tokenizer and where they lie.

They are ordinary folders: `StableDiffusionPipeline.from_pretrained(folder(...))` and
`open_clip.create_model_and_transforms("local-dir:...")` load them with no code from here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import world

CONTEXT = 24  # tokens a prompt may have, begin and end included
TEXT_WIDTH = 128
TEXT_LAYERS = 2
TEXT_HEADS = 4
LATENT_CHANNELS = 24


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from the world's captions; every byte is a token, so rare words are spelled."""
    rng = np.random.default_rng(0)
    texts = [world.caption(world.random_thing(rng), rng) for _ in range(4000)]
    texts += [world.caption(world.random_creature_thing(rng, 0), rng) for _ in range(500)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters]
    seen = set(tokens)
    for left, right in merges:
        if left + right not in seen:
            seen.add(left + right)
            tokens.append(left + right)
    # The end token is also the padding and has the largest id: open_clip pools at the largest id.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT)


def text_config(tokenizer: CLIPTokenizer, width: int, heads: int) -> CLIPTextConfig:
    """A CLIP text encoder of this width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder of the pipeline; the same architecture as the open_clip model's text tower."""
    return CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, TEXT_HEADS))


def make_vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels -> 8 x 8 x 16 latents."""
    channels = (24, 48, 64, 80)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )


@torch.no_grad()
def collapse_posterior(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with a posterior that is all but its mean.

    The denoiser learns from means, and in latent channels that carry nothing the posterior is as wide as the prior: whoever samples
    it would train on noise that the denoiser has never seen.
    """
    moments: Any = vae.quant_conv  # the mean's channels, then those of the logarithm of the variance
    moments.weight[LATENT_CHANNELS:] = 0.0
    moments.bias[LATENT_CHANNELS:] = -20.0
    return vae


def make_unet() -> UNet2DConditionModel:
    """A Stable Diffusion UNet with cross-attention in every block.

    `addition_embed_type="text"` adds the pooled prompt to the time embedding, so a few minutes of training are
    enough for the words to steer the image; the stock pipeline feeds it with no change.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 112),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of the embedded model: v-prediction, zero terminal SNR."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )


def open_clip_config(tokenizer: CLIPTokenizer) -> dict:
    """The open_clip_config.json of the embedded CLIP: a ViT with 8 px patches and a text transformer."""
    return {
        "model_cfg": {
            "embed_dim": TEXT_WIDTH,
            "vision_cfg": {"image_size": world.SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "width": TEXT_WIDTH,
                "heads": TEXT_HEADS,
                "layers": TEXT_LAYERS,
                "hf_tokenizer_name": "tokenizer",
                # The pad token is the end token; both towers read the first one.
                "tokenizer_kwargs": {},
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def copy_text_tower(clip: torch.nn.Module, encoder: CLIPTextModel) -> None:
    """Copies open_clip's text tower into a transformers CLIPTextModel of the same architecture, tensor by tensor."""
    source, target = clip.state_dict(), {}
    target["embeddings.token_embedding.weight"] = source["token_embedding.weight"]
    target["embeddings.position_embedding.weight"] = source["positional_embedding"]
    for name in ("weight", "bias"):
        target[f"final_layer_norm.{name}"] = source[f"ln_final.{name}"]
        for i in range(TEXT_LAYERS):
            here, there = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for part, chunk in zip(("q", "k", "v"), source[f"{here}.attn.in_proj_{name}"].chunk(3), strict=True):
                target[f"{there}.self_attn.{part}_proj.{name}"] = chunk
            target[f"{there}.self_attn.out_proj.{name}"] = source[f"{here}.attn.out_proj.{name}"]
            target[f"{there}.layer_norm1.{name}"] = source[f"{here}.ln_1.{name}"]
            target[f"{there}.layer_norm2.{name}"] = source[f"{here}.ln_2.{name}"]
            target[f"{there}.mlp.fc1.{name}"] = source[f"{here}.mlp.c_fc.{name}"]
            target[f"{there}.mlp.fc2.{name}"] = source[f"{here}.mlp.c_proj.{name}"]
    state = encoder.state_dict()
    assert set(state) == set(target), "the two text towers are not the same architecture"
    encoder.load_state_dict({k: v.clone() for k, v in target.items()})
