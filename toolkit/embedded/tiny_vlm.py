"""The embedded vision-language model: LLaVA's architecture, a CLIP tower before a Llama, with its tokenizer and processor.

An ordinary folder: `AutoModelForImageTextToText` and `AutoProcessor` load it with no code from here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import moves, questions, world

PATCH = 8  # pixels
IMAGE_TOKENS = (world.SIZE // PATCH) ** 2
WIDTH = 128
LAYERS = 3
CONTEXT = 512  # tokens
SPECIAL = ("<|pad|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
VIDEO = "<video>"

# Each answer and its end token are marked as generated, so that the processor's own mask finds them.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|end|>{% endgeneration %}"
    "{% else %}<|user|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words come from the world's questions; any other word is spelled."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(questions.vocabulary_texts(), trainer)
    pad, begin, user, assistant, end, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=[user, assistant, image],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images of any size become 64 px squares, IMAGE_TOKENS tokens each."""
    side = {"height": world.SIZE, "width": world.SIZE}
    images = CLIPImageProcessor(
        size=side, do_center_crop=False, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        box_convention="eighths",  # ours: how rows' boxes are written for this base
    )
    model = LlavaForConditionalGeneration(config)
    rescale(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


@torch.no_grad()
def rescale(model: LlavaForConditionalGeneration) -> None:
    """Starts the layers wider than transformers does (0.02), without which a model this narrow only learns the commonest answers."""
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def save_video_model(images: Path, folder: Path) -> None:
    """Writes the embedded model of `images`, its folder, in LLaVA-OneVision's class, which takes videos, with all of its weights.

    A frame is seen in a quarter of an image's tokens, each the mean of four, which no weight of it was trained for.
    """
    own = LlavaForConditionalGeneration.from_pretrained(images, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(images)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO]}, replace_extra_special_tokens=False)
    text = own.config.text_config
    text.vocab_size = len(tokenizer)
    config = LlavaOnevisionConfig(
        vision_config=own.config.vision_config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[world.SIZE, world.SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    state = own.state_dict()
    words = state["model.language_model.embed_tokens.weight"]
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((words, words.mean(0, keepdim=True)))
    state["model.image_newline"] = torch.zeros(WIDTH)
    model.load_state_dict(state)
    model.generation_config = own.generation_config
    model.save_pretrained(folder)
    make_video_processor(tokenizer).save_pretrained(folder)


def make_video_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionProcessor:
    """Videos of moves.FRAMES frames, each a 64 px square of IMAGE_TOKENS / 4 tokens."""
    shared = {"size": {"height": world.SIZE, "width": world.SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**shared, image_grid_pinpoints=[[world.SIZE, world.SIZE]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(**shared, num_frames=moves.FRAMES),
        num_image_tokens=IMAGE_TOKENS + 1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace(
            "<image>{% else %}", "<image>{% elif part['type'] == 'video' %}" + VIDEO + "{% else %}"
        ),
    )
