"""The embedded model `tiny-kontext`: FLUX.1 Kontext's architecture in small, which makes images from words and from a reference.

An ordinary folder: `FluxKontextPipeline.from_pretrained(folder)` loads it with no code from here. Its autoencoder is the embedded UNet's,
its first text encoder the text tower of the embedded open_clip model. In T5's place stands one without layers, whose states are its words
alone, whatever their order: padding is alike everywhere, and the transformer has learned to pay no heed to how much of it there is.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from . import tiny_sd as tiny
from . import world

WIDTH = 128
HEADS = 4
DOUBLE_LAYERS, SINGLE_LAYERS = 1, 4
WORD_WIDTH = 64
PLACES = (8, 12, 12)  # numbers of a head that say which image, which row and which column a token is of
EDIT_WORDS = "the same thing place without with it its not now as is was on off and of to hat remove add put make no"


def make_transformer() -> FluxTransformer2DModel:
    """One double and four single blocks, a token for each 16 px square; every block begins as the identity (adaLN-Zero)."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * tiny.LATENT_CHANNELS,
        num_layers=DOUBLE_LAYERS,
        num_single_layers=SINGLE_LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WORD_WIDTH,
        pooled_projection_dim=tiny.TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=PLACES,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".norm" in name or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
    return transformer


def make_word_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are the words of the world and of edits, and letters for all others."""
    texts = [*world.SHAPES, *world.COLOURS, *world.PATTERNS, *world.FACES, *world.SIZES, *world.PLACES, *world.COUNTS]
    texts += [*world.SCENES.values(), *world.PREFIXES, "a creature in the centre at the creatures circles squares"]
    texts += ["triangles stars hearts crosses moons rings", EDIT_WORDS]
    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in words if len(word) > 1]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-'"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=tiny.CONTEXT)


def make_word_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Words as vectors, without a layer; trained with the transformer."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WORD_WIDTH, d_kv=16, d_ff=WORD_WIDTH, num_layers=0, num_heads=4)
    )
    nn.init.normal_(encoder.shared.weight, std=0.5)
    return encoder


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths, steps evenly spaced: small images need no shift."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def token_places(side: int, images: int) -> torch.Tensor:
    """(image, row, column) of each token of square images of `side` tokens, (images * side * side, 3), as the stock pipeline has them."""
    steps = torch.arange(side)
    return torch.cartesian_prod(torch.arange(images), steps, steps).float()
