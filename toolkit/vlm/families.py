"""The families of vision-language models: where their parts are, and how their linear layers are called."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class VisionLanguageFamily:
    """Where the parts of a kind of model are, and how their linear layers are called."""

    model_types: tuple[str, ...]
    """model_type in config.json."""
    language: str
    tower: str
    projector: tuple[str, ...]
    tower_attention: tuple[str, ...]
    tower_mlp: tuple[str, ...]
    language_attention: tuple[str, ...] = ATTENTION
    language_mlp: tuple[str, ...] = GATED
    chat_template: str | None = None
    """Chat template for bases that have none."""
    prefix_attention: bool = False
    """Whether the prompt's tokens see one another in both directions, so that the answer's tokens must be told from them."""
    appended: str = ""
    """What the processor puts after every text."""
    boxes: str = "relative"
    """How places in images are written, see grounding.py."""
    takes_video: bool = True
    """Whether videos can be learned, where the processor takes them."""
    equal_videos: bool = False
    """Whether the videos of a batch must have one number of frames."""
    supports_packing: bool = True
    """Whether rows can lie end to end in one sequence without seeing one another."""


CLIP = {"tower_attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "tower_mlp": ("fc1", "fc2")}
LLAVA = ("model.language_model", "model.vision_tower", ("model.multi_modal_projector",))
QWEN = ("model.language_model", "model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"))


# Images, question, answer; the processor puts a line break between the last two when it asks.
PALIGEMMA = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


FAMILIES = (
    VisionLanguageFamily(
        ("llava", "llava_next"), *LLAVA, (*CLIP["tower_attention"], "o_proj"), (*CLIP["tower_mlp"], *GATED)
    ),  # with CLIP's or SigLIP's tower, or Pixtral's
    VisionLanguageFamily(("llava_onevision",), *LLAVA, **CLIP, equal_videos=True),
    VisionLanguageFamily(("mistral3",), *LLAVA, ("q_proj", "k_proj", "v_proj", "o_proj"), GATED),
    # transformers 5.23 looks images of packed rows up by their place in their own row, and so takes another row's.
    VisionLanguageFamily(("gemma3",), *LLAVA, **CLIP, supports_packing=False),
    # The tokens of an image see one another in both directions, in the larger ones.
    VisionLanguageFamily(
        ("gemma4",),
        "model.language_model",
        "model.vision_tower",
        ("model.embed_vision",),
        tuple(f"{name}.linear" for name in ATTENTION),
        tuple(f"{name}.linear" for name in GATED),
        supports_packing=False,
    ),
    # Qwen3.5's language model, see there. Patches of all images lie in one row, which rows with videos cannot be joined from.
    VisionLanguageFamily(
        ("minicpmv4_6",),
        "model.language_model",
        "model.vision_tower",
        ("model.vision_tower.vit_merger", "model.merger"),
        **CLIP,
        language_attention=(*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        takes_video=False,
        supports_packing=False,
    ),
    VisionLanguageFamily(
        ("paligemma",),
        *LLAVA,
        **CLIP,
        chat_template=PALIGEMMA,
        prefix_attention=True,
        appended="\n",
        boxes="locations",
        supports_packing=False,
    ),
    VisionLanguageFamily(
        ("idefics3", "smolvlm"), "model.text_model", "model.vision_model", ("model.connector",), **CLIP
    ),
    VisionLanguageFamily(("qwen2_vl",), *QWEN, ("qkv", "proj"), ("fc1", "fc2"), boxes="thousand"),
    VisionLanguageFamily(("qwen2_5_vl",), *QWEN, ("qkv", "proj"), GATED, boxes="pixels"),
    VisionLanguageFamily(("qwen3_vl",), *QWEN, ("qkv", "proj"), ("linear_fc1", "linear_fc2"), boxes="thousand"),
    # Linear attention beside full: its state would go on from one packed row into the next.
    VisionLanguageFamily(
        ("qwen3_5",),
        *QWEN,
        ("qkv", "proj"),
        ("linear_fc1", "linear_fc2"),
        (*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        boxes="thousand",
        supports_packing=False,
    ),
    # transformers 5.23 cannot tell a video's tokens from an image's in one batch.
    VisionLanguageFamily(
        ("glm4v", "glm46v"),
        *QWEN,
        ("qkv", "proj"),
        GATED,
        language_mlp=("gate_up_proj", "down_proj"),
        boxes="thousand",
        takes_video=False,
    ),
    # Short convolutions beside attention, which would reach over the joint of packed rows.
    VisionLanguageFamily(
        ("lfm2_vl",),
        *LLAVA,
        **CLIP,
        language_attention=(*ATTENTION[:3], "out_proj", "in_proj"),
        language_mlp=("w1", "w2", "w3"),
        supports_packing=False,
    ),
    VisionLanguageFamily(
        ("internvl",), *LLAVA, ("q_proj", "k_proj", "v_proj", "projection_layer"), ("fc1", "fc2"), boxes="thousand"
    ),
)


PARTS = ("language-attention", "language-mlp", "vision-attention", "vision-mlp", "projector")


def find_family(kind: str) -> VisionLanguageFamily | None:
    """The family of a model_type."""
    return next((family for family in FAMILIES if kind in family.model_types), None)
