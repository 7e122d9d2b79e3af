"""A random picture-and-text model of each family with its true classes, well under a megabyte, saved as a folder.

Widths and depths are the smallest that the architectures allow. Layouts, special tokens, the counts of image tokens
and the shape of the chat templates are those of the published models; the templates themselves are rewritten here.
"""

from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers

WIDTH = 32
SIDE = 28  # of what a vision tower sees, pixels
PATCH = 7
GRID = SIDE // PATCH
TILES = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
SQUARE = {"height": SIDE, "width": SIDE}
# pieces of more than one letter, the first with the space before them, the second without
WORDS = ["a", "the", "is", "it", "in", "of", "this", "what", "red", "blue", "green", "square", "circle", "picture"]
NAMES = ["user", "assistant", "model", "system"]


# ---------------------------------------------------------------------------------------------- tokenizers


def grow(letters: list[str], words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces of a BPE tokenizer that starts from these letters and knows these words, and its merges."""
    pieces, merges = list(letters), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return pieces, merges


def byte_level() -> dict:
    """As GPT-2's: a letter for each byte. Two line breaks are one piece, as in all the real ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = grow(letters, [*(f"Ġ{word}" for word in WORDS), *NAMES, "ĊĊ"])
    return {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}


def byte_fallback(first: list[str], breaks: list[str]) -> dict:
    """As SentencePiece's: ▁ for a space, a piece for each byte that has no letter; `first` take the first ids."""
    letters = [*first, *(f"<0x{i:02X}>" for i in range(256)), "▁", *(chr(i) for i in range(33, 127)), *breaks[:1]]
    pieces, merges = grow(letters, [*(f"▁{word}" for word in WORDS), *NAMES, *breaks[1:]])
    return {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}


def llama(*extra: str, pad: str, **named: str):
    """Of Llama 2 and Mistral: puts `<s>` first by itself; a line break is a bare byte."""
    return transformers.LlamaTokenizerFast(
        **byte_fallback(["<unk>", "<s>", "</s>"], []), pad_token=pad, add_bos_token=True, padding_side="left",
        extra_special_tokens=list(extra), **named,
    )  # fmt: skip


def llama_3(*extra: str, **named: str):
    """Of Llama 3: byte-level, and still puts its `<|begin_of_text|>` first by itself."""
    return plain(
        *extra, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|reserved|>",
        add_bos_token=True, **named,
    )  # fmt: skip


def plain(*extra: str, **named):
    """Byte-level and of no class of its own."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(**byte_level()))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=list(extra), **named)


def qwen(*extra: str, **named: str):
    """Of Qwen: nothing is put first, a turn ends with the token that ends the text, padding has its own."""
    return transformers.Qwen2TokenizerFast(
        **byte_level(), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *extra], **named,
    )  # fmt: skip


def gemma(*extra: str, **named: str):
    """Of Gemma: puts `<bos>` first by itself; one and two line breaks are pieces."""
    return transformers.GemmaTokenizerFast(
        **byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], ["\n", "\n\n"]), add_bos_token=True,
        extra_special_tokens=list(extra), **named,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- chat templates

MACROS = (
    "{% macro images(content) %}{% if content is not string %}{% for part in content if part.type != 'text' %}"
    "{% if part.type == 'image' %}IMAGE{% else %}VIDEO{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% macro say(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)


def template(image: str, body: str, video: str = "") -> str:
    """A template whose body may call `say(content)`, or `images(content)` and then `words(content)`."""
    return MACROS.replace("IMAGE", image).replace("VIDEO", video) + body


# images first; no token ends an answer, and the prompt stops short of the space that the answer begins with
LLAVA = template(
    "<image>\n",
    "{% for m in messages %}{{ '' if m.role == 'system' else (m.role | upper) ~ ': ' }}"
    "{{ images(m.content) ~ words(m.content) ~ ' ' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}",
)
# the prompt is no turn of its own, `[/INST]` ends it; marks what is learnt
LLAVA_NEXT = template(
    "<image>\n",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' ~ words(m.content) ~ '</s>' }}"
    "{% endgeneration %}{% elif m.role == 'system' %}{{ words(m.content) ~ '\n' }}"
    "{% else %}{{ '[INST] ' ~ images(m.content) ~ words(m.content) ~ ' [/INST]' }}{% endif %}{% endfor %}",
)
# as LLaVA-NeXT's, images where they stand
MISTRAL_3 = template(
    "[IMG]",
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' ~ words(m.content) ~ '</s>' }}"
    "{% elif m.role == 'system' %}{{ words(m.content) ~ '\n' }}"
    "{% else %}{{ '[INST] ' ~ say(m.content) ~ ' [/INST]' }}{% endif %}{% endfor %}",
)
# an answer's role is followed by a space and the prompt's is not, so that the prompt is no beginning of the whole
ONEVISION = template(
    "<image>",
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ' ' ~ images(m.content) ~ '\n' ~ words(m.content) }}"
    "<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    "<video>",
)
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ say(m.content) ~ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
LLAVA_QWEN = template("<image>\n", TURNS)
INTERNVL = template("<IMG_CONTEXT>\n", TURNS, "<video>\n")
# a system turn that nobody asked for
QWEN_2 = template(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "{{ '' if messages[0].role == 'system' else '<|im_start|>system\nAnswer in short.<|im_end|>\n' }}" + TURNS,
    "<|vision_start|><|video_pad|><|vision_end|>",
)
# marks what is learnt
QWEN_3 = template(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ say(m.content) ~ '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ say(m.content) ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    "<|vision_start|><|video_pad|><|vision_end|>",
)
# a turn ends where the next role begins, so that answers have no end of their own
GLM = template(
    "<|begin_of_image|><|image|><|end_of_image|>",
    "[gMASK]<sop>{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ say(m.content) }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '' }}",
    "<|begin_of_video|><|video|><|end_of_video|>",
)
# begins with the token that (Idefics 3) the tokenizer puts first too; a space only before words
IDEFICS = template(
    "<image>",
    "{{ bos_token }}{% for m in messages %}{{ (m.role | capitalize) ~ ':' }}"
    "{{ ' ' if m.content is string or m.content[0].type == 'text' else '' }}"
    "{{ say(m.content) ~ '<end_of_utterance>\n' }}{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}",
    "<video>",
)
# the processor itself puts `<bos>` behind the images and a line break behind everything
PALIGEMMA = template(
    "<image>",
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\n' ~ words(m.content) ~ eos_token }}{% else %}"
    "{{ images(m.content) ~ words(m.content) }}{% endif %}{% endfor %}",
)
# begins with the token that the tokenizer puts first too; the answers' role is `model`, every text is trimmed and the
# system's goes before the next turn's
GEMMA_3 = template(
    "<start_of_image>",
    "{% set before = namespace(text='') %}{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set before.text = say(m.content) ~ '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ before.text ~ say(m.content) ~ '<end_of_turn>\n' }}{% set before.text = '' %}{% endif %}{% endfor %}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}",
)
GEMMA_3 = GEMMA_3.replace("{{ content }}", "{{ content | trim }}").replace("{{ part.text }}", "{{ part.text | trim }}")


# ---------------------------------------------------------------------------------------------- parts


def text(kind: type, tokenizer, **more):
    """The configuration of a language model, with a few more rows of embeddings than there are tokens."""
    return kind(**{
        "vocab_size": -(-(len(tokenizer) + 1) // 64) * 64, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": WIDTH // 4,
        "max_position_embeddings": 1024, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1, **more,
    })  # fmt: skip


def tower(kind: type, **more):
    """The configuration of a vision tower."""
    return kind(**{
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH, **more,
    })  # fmt: skip


def ends(model, tokenizer, *tokens: str):
    """Tells the model at which tokens it stops when it generates."""
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in tokens],
    )  # fmt: skip
    return model


# ---------------------------------------------------------------------------------------------- families


def llava():
    """LLaVA 1.5: the last but one layer of CLIP less its first token; every image is cropped to the same square."""
    tokenizer = llama("<image>", pad="<pad>")
    config = transformers.LlavaConfig(
        text_config=text(transformers.LlamaConfig, tokenizer), vision_config=tower(transformers.CLIPVisionConfig),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=GRID**2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=LLAVA,
    )  # fmt: skip
    return ends(transformers.LlavaForConditionalGeneration(config), tokenizer, "</s>"), processor


def llava_siglip():
    """LLaVA Interleave: the last layer of SigLIP in full, a small Qwen 2 whose head is its table of embeddings."""
    tokenizer = qwen("<image>")
    words = text(transformers.Qwen2Config, tokenizer, tie_word_embeddings=True)
    config = transformers.LlavaConfig(
        text_config=words, vision_config=tower(transformers.SiglipVisionConfig, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=GRID**2,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        transformers.SiglipImageProcessor(size=SQUARE), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=LLAVA_QWEN,
    )  # fmt: skip
    return ends(transformers.LlavaForConditionalGeneration(config), tokenizer, "<|im_end|>"), processor


def llava_next():
    """LLaVA 1.6 on Mistral: the image as a whole and cut into tiles, whose number depends on its shape."""
    tokenizer = llama("<image>", pad="<pad>")
    config = transformers.LlavaNextConfig(
        text_config=text(transformers.MistralConfig, tokenizer, sliding_window=None),
        vision_config=tower(transformers.CLIPVisionConfig), image_grid_pinpoints=TILES[1:], image_seq_length=GRID**2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=TILES[1:]
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    )  # fmt: skip
    return ends(transformers.LlavaNextForConditionalGeneration(config), tokenizer, "</s>"), processor


def llava_onevision():
    """LLaVA OneVision: tiles for an image that is alone in its row, one small square for each of several."""
    tokenizer = qwen("<image>", "<video>")
    config = transformers.LlavaOnevisionConfig(
        text_config=text(transformers.Qwen2Config, tokenizer),
        vision_config=tower(transformers.SiglipVisionConfig, vision_use_head=False), image_grid_pinpoints=TILES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILES), tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE), num_image_tokens=GRID**2,
        vision_feature_select_strategy="full", chat_template=ONEVISION,
    )  # fmt: skip
    return ends(transformers.LlavaOnevisionForConditionalGeneration(config), tokenizer, "<|im_end|>"), processor


def mistral_3(**words):
    """Mistral Small 3: Pixtral's tower at the image's own shape, four patches a token, a token behind every row of them."""
    tokenizer = llama("[IMG]", "[IMG_BREAK]", "[IMG_END]", pad="<pad>")
    config = transformers.Mistral3Config(
        text_config=text(transformers.MistralConfig, tokenizer, sliding_window=None, **words),
        vision_config=tower(transformers.PixtralVisionConfig, head_dim=WIDTH // 2, image_size=2 * SIDE),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=PATCH)
    processor = transformers.PixtralProcessor(
        images, tokenizer, patch_size=PATCH, spatial_merge_size=2, chat_template=MISTRAL_3
    )
    return ends(transformers.Mistral3ForConditionalGeneration(config), tokenizer, "</s>"), processor


def qwen_vl(config: type, kind: type, processor: type, chat: str, vision: dict, words: dict, videos: type, **more):
    """What the Qwen-VL families share: as many patches as the image is large, positions in three dimensions."""
    tokenizer = qwen("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    patch = {"patch_size": vision["patch_size"], "temporal_patch_size": 2}
    made = config(
        text_config=text(dict, tokenizer, **words),
        vision_config={"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"), **more,
    )  # fmt: skip
    size = {"shortest_edge": SIDE**2, "longest_edge": (2 * SIDE) ** 2}
    images = transformers.Qwen2VLImageProcessor(size=size, merge_size=2, **patch)
    films = videos(size=size, merge_size=2, **patch)
    model = ends(kind(made), tokenizer, "<|im_end|>", "<|endoftext|>")
    return model, processor(images, tokenizer, films, chat_template=chat)


def qwen_2_vl():
    """Qwen2-VL: full attention in the vision tower, LayerNorm, an MLP of two linears."""
    return qwen_vl(
        transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLProcessor, QWEN_2,
        {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2, "patch_size": PATCH},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        transformers.Qwen2VLVideoProcessor,
    )  # fmt: skip


def qwen_2_5_vl():
    """Qwen2.5-VL: windows in the first layer of the vision tower, all of the image in the second; gated MLPs."""
    return qwen_vl(
        transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLProcessor, QWEN_2,
        {
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "patch_size": PATCH,
            "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        transformers.Qwen2VLVideoProcessor,
    )  # fmt: skip


def qwen_3_vl(**words):
    """Qwen3-VL: the first vision layer also feeds the first language layer; the head is the table of embeddings."""
    return qwen_vl(
        transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLProcessor, QWEN_3,
        {
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "patch_size": PATCH + 1,
            "num_position_embeddings": GRID**2, "deepstack_visual_indexes": [0],
        },
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
            **words,
        },
        transformers.Qwen3VLVideoProcessor, tie_word_embeddings=True,
    )  # fmt: skip


def qwen_3_5():
    """Qwen3.5: linear attention in the first language layer, full attention with a gate in the second."""
    return qwen_vl(
        transformers.Qwen3_5Config, transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3VLProcessor, QWEN_3,
        {
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "patch_size": PATCH + 1,
            "num_position_embeddings": GRID**2,
        },
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        },
        transformers.Qwen3VLVideoProcessor,
    )  # fmt: skip


def glm(config: type, kind: type, processor: type, images: type, films: type):
    """What GLM-4.1V and GLM-4.6V share: Qwen2-VL's patches, gate and up projection of the language model in one layer."""
    tokenizer = plain(
        "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image|>",
        "<|begin_of_video|>", "<|end_of_video|>", "<|video|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        padding_side="left",
    )  # fmt: skip
    known = tokenizer.convert_tokens_to_ids
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    words = text(dict, tokenizer, model_type="glm4v_text", **rope)
    made = config(
        text_config={key: value for key, value in words.items() if key != "head_dim"},
        vision_config={
            "model_type": "glm4v_vision", "depth": 2, "num_heads": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
            "out_hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH,
        },
        image_token_id=known("<|image|>"), image_start_token_id=known("<|begin_of_image|>"),
        image_end_token_id=known("<|end_of_image|>"), video_token_id=known("<|video|>"),
        video_start_token_id=known("<|begin_of_video|>"), video_end_token_id=known("<|end_of_video|>"),
    )  # fmt: skip
    size = {"shortest_edge": 2 * SIDE**2, "longest_edge": 2 * (2 * SIDE) ** 2}
    patch = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    model = ends(kind(made), tokenizer, "<|endoftext|>", "<|user|>")
    return model, processor(images(**patch), tokenizer, films(**patch), chat_template=GLM)


def glm_4v():
    """GLM-4.1V."""
    return glm(
        transformers.Glm4vConfig, transformers.Glm4vForConditionalGeneration, transformers.Glm4vProcessor,
        transformers.Glm4vImageProcessor, transformers.Glm4vVideoProcessor,
    )  # fmt: skip


def glm_46v():
    """GLM-4.6V."""
    return glm(
        transformers.Glm46VConfig, transformers.Glm46VForConditionalGeneration, transformers.Glm46VProcessor,
        transformers.Glm46VImageProcessor, transformers.Glm46VVideoProcessor,
    )  # fmt: skip


def lfm_2_vl():
    """LFM2-VL: a short convolution in the first language layer, attention in the second; SigLIP 2 at the image's own shape."""
    tokenizer = plain(
        "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", bos_token="<|startoftext|>",
        eos_token="<|im_end|>", pad_token="<|pad|>", padding_side="left",
    )  # fmt: skip
    words = text(dict, tokenizer, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(**words),
        vision_config=tower(transformers.Siglip2VisionConfig, num_patches=GRID**2, vision_use_head=False),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), projector_hidden_size=WIDTH,
    )  # fmt: skip
    images = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=PATCH, tile_size=SIDE, min_image_tokens=2, max_image_tokens=4, max_tiles=4
    )
    processor = transformers.Lfm2VlProcessor(
        images, tokenizer, chat_template="{{ bos_token }}" + template("<image>", TURNS)
    )
    return ends(transformers.Lfm2VlForConditionalGeneration(config), tokenizer, "<|im_end|>"), processor


def pixtral():
    """Pixtral 12B as transformers has it: LLaVA with Pixtral's tower, a token behind every row of patches."""
    tokenizer = llama("[IMG]", "[IMG_BREAK]", "[IMG_END]", pad="<pad>")
    config = transformers.LlavaConfig(
        text_config=text(transformers.MistralConfig, tokenizer, sliding_window=None),
        vision_config=tower(transformers.PixtralVisionConfig, head_dim=WIDTH // 2, image_size=2 * SIDE),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=PATCH)
    processor = transformers.PixtralProcessor(
        images, tokenizer, patch_size=PATCH, spatial_merge_size=1, image_token="[IMG]", image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]", chat_template=MISTRAL_3,
    )  # fmt: skip
    return ends(transformers.LlavaForConditionalGeneration(config), tokenizer, "</s>"), processor


CELLS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
FRAME = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def idefics(config: type, tower_config: type, kind: type, tokenizer, stops: list[str]):
    """What Idefics 3 and SmolVLM share: an image is cut into rows and columns that words announce."""
    config = config(
        text_config=text(transformers.LlamaConfig, tokenizer), vision_config=tower(tower_config), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return ends(kind(config), tokenizer, *stops)


def idefics_3():
    """Idefics 3 on Llama 3: every image has more than one cell here, whose rows end with line breaks."""
    tokenizer = llama_3("<end_of_utterance>", *CELLS, **FRAME)
    model = idefics(
        transformers.Idefics3Config, transformers.Idefics3VisionConfig, transformers.Idefics3ForConditionalGeneration,
        tokenizer, ["<end_of_utterance>", "<|end_of_text|>"],
    )  # fmt: skip
    images = transformers.Idefics3ImageProcessor(**SPLIT)
    tokens = (GRID // 2) ** 2
    return model, transformers.Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=IDEFICS)


def smolvlm():
    """SmolVLM 2: as Idefics 3, but its tokenizer puts nothing first. Its processor needs the package `num2words`."""
    tokenizer = plain(
        "<|endoftext|>", *CELLS, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>",
        end_of_utterance_token="<end_of_utterance>", **FRAME,
    )  # fmt: skip
    model = idefics(
        transformers.SmolVLMConfig, transformers.SmolVLMVisionConfig, transformers.SmolVLMForConditionalGeneration,
        tokenizer, ["<end_of_utterance>"],
    )  # fmt: skip
    films = transformers.SmolVLMVideoProcessor(
        **SPLIT, video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": SIDE}}
    )
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**SPLIT), tokenizer, films, image_seq_len=(GRID // 2) ** 2,
        chat_template=IDEFICS,
    )  # fmt: skip
    return model, processor


def paligemma():
    """PaliGemma: what comes before the answer is seen in both directions. The published ones have no chat template."""
    tokenizer = gemma(image_token="<image>")
    images = transformers.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = GRID**2
    processor = transformers.PaliGemmaProcessor(images, tokenizer, chat_template=PALIGEMMA)  # adds a thousand tokens
    words = text(transformers.GemmaConfig, tokenizer, num_key_value_heads=1)
    config = transformers.PaliGemmaConfig(
        text_config=words, vision_config=tower(transformers.SiglipVisionConfig, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=WIDTH, hidden_size=WIDTH,
        vocab_size=words.vocab_size,
    )  # fmt: skip
    return ends(transformers.PaliGemmaForConditionalGeneration(config), tokenizer, "<eos>"), processor


def gemma_3():
    """Gemma 3: the tokens of an image see each other in both directions; one layer of the two has a sliding window."""
    tokenizer = gemma(
        "<start_of_turn>", "<end_of_turn>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )  # fmt: skip
    tokens = (GRID // 2) ** 2
    words = text(
        transformers.Gemma3TextConfig, tokenizer, num_key_value_heads=1, query_pre_attn_scalar=WIDTH // 4,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=words, vision_config=tower(transformers.SiglipVisionConfig, vision_use_head=False),
        mm_tokens_per_image=tokens, boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=tokens, chat_template=GEMMA_3
    )
    return ends(transformers.Gemma3ForConditionalGeneration(config), tokenizer, "<eos>", "<end_of_turn>"), processor


# as Gemma 3's, nothing is trimmed; the system prompt is a turn of its own
GEMMA_4 = template(
    "<|image|>",
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ say(m.content) ~ '<turn|>\n' }}{% endfor %}{{ '<|turn>model\n' if add_generation_prompt else '' }}",
    "<|video|>",
)


def gemma_4():
    """Gemma 4: patches as rows of numbers, pooled by nine; the second layer has keys and values from the first, and per-layer inputs."""
    tokenizer = gemma(
        "<|turn>", "<turn|>", "<|video|>", image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
        boa_token="<|audio>", eoa_token="<audio|>",
    )  # fmt: skip
    known = tokenizer.convert_tokens_to_ids
    words = text(
        dict, tokenizer, hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_hidden_layers=3, num_kv_shared_layers=1, global_head_dim=WIDTH // 2, sliding_window=64,
    )  # fmt: skip
    words["vocab_size_per_layer_input"] = words["vocab_size"]
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": WIDTH // 2, "patch_size": 4, "position_embedding_size": 256,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=words, vision_config=vision, audio_config=None, boi_token_id=known("<|image>"), eoi_token_id=known("<image|>"),
        image_token_id=known("<|image|>"), video_token_id=known("<|video|>"), audio_token_id=known("<|audio|>"),
        boa_token_id=known("<|audio>"), eoa_token_index=known("<audio|>"),
    )  # fmt: skip
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70), tokenizer,
        transformers.Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70), image_seq_length=70, chat_template=GEMMA_4,
    )  # fmt: skip
    return ends(transformers.Gemma4ForConditionalGeneration(config), tokenizer, "<eos>", "<turn|>"), processor


MINICPM = template("<|image_pad|>", TURNS, "<|video_pad|>")


def minicpm_v():
    """MiniCPM-V 4.6: Qwen3.5's language model; patches of all images in one row, merged within the tower; images have numbers."""
    tokenizer = qwen(
        image_token="<|image_pad|>", video_token="<|video_pad|>", image_start_token="<image_start>", image_end_token="<image_end>",
        slice_start_token="<slice>", slice_end_token="</slice>", image_id_start_token="<image_id>", image_id_end_token="</image_id>",
    )  # fmt: skip
    words = text(
        dict, tokenizer, model_type="qwen3_5_text", layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            "partial_rotary_factor": 1.0,
        },
    )  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8 * PATCH,
        "patch_size": PATCH,
    }  # fmt: skip
    config = transformers.MiniCPMV4_6Config(
        text_config=words, vision_config=vision, insert_layer_id=0, image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )  # fmt: skip
    shared = {"patch_size": PATCH, "scale_resolution": 8 * PATCH, "max_slice_nums": 4}
    processor = transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(**shared), transformers.MiniCPMV4_6VideoProcessor(**shared), tokenizer,
        chat_template=MINICPM,
    )  # fmt: skip
    return ends(transformers.MiniCPMV4_6ForConditionalGeneration(config), tokenizer, "<|im_end|>"), processor


def internvl():
    """InternVL 3: the image cut into tiles and as a whole, all of it one run of tokens between two that frame it."""
    tokenizer = qwen(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    tokens = (GRID // 2) ** 2
    config = transformers.InternVLConfig(
        text_config=text(transformers.Qwen2Config, tokenizer), image_token_id=tokenizer.context_image_token_id,
        vision_config=tower(transformers.InternVLVisionConfig, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        image_seq_length=tokens, tie_word_embeddings=True,
    )  # fmt: skip
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4), tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE), image_seq_length=tokens, chat_template=INTERNVL,
    )  # fmt: skip
    return ends(transformers.InternVLForConditionalGeneration(config), tokenizer, "<|im_end|>"), processor


BUILDERS: dict[str, Callable[[], tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]]] = {
    "llava": llava,
    "llava-siglip": llava_siglip,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "mistral3": mistral_3,
    "qwen2-vl": qwen_2_vl,
    "qwen2.5-vl": qwen_2_5_vl,
    "qwen3-vl": qwen_3_vl,
    "qwen3.5-vl": qwen_3_5,
    "glm4v": glm_4v,
    "glm46v": glm_46v,
    "lfm2-vl": lfm_2_vl,
    "pixtral": pixtral,
    "idefics3": idefics_3,
    "smolvlm": smolvlm,
    "paligemma": paligemma,
    "gemma3": gemma_3,
    "gemma4": gemma_4,
    "minicpm-v": minicpm_v,
    "internvl": internvl,
}


def build(name: str, folder: Path) -> Path:
    """Saves the model and the processor of this name, the model's weights drawn from a seed."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    for parameter in model.parameters():  # some layers begin at zero, which would hide what they do
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
