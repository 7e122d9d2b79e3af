"""How tools name an adapter's tensors: a row for each ending, each beginning, and each wrapper that a name may carry."""

from __future__ import annotations

import re

# ending -> what the tensor is to its layer (methods.py). The layer's name is what stands before it.
ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
    ".bm.weight": "bm",
} | {f".{name}": name for name in (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)}  # fmt: skip
# ending -> the kind of adapter that it belongs to, which is refused by its name
UNREAD = {
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".oft_R.weight": "OFT",
    ".rescale": "BOFT",
    ".boft_R": "BOFT",
    ".boft_s": "BOFT",
    ".on_input": "(IA)3",
    ".ia3_l": "(IA)3",
    ".lora_embedding_A": "LoRA on embeddings",
    ".lora_embedding_B": "LoRA on embeddings",
    ".lora_E": "AdaLoRA",
    ".ranknum": "AdaLoRA",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".hra_u": "HRA",
    ".set_weight": "a change that replaces weights",
    ".reshape_weight": "a change that gives layers another shape",
    ".scalar": "LyCORIS with a scalar of its own",
    ".q_layer.weight": "T-LoRA",
    ".p_layer.weight": "T-LoRA",
    ".lambda_layer": "T-LoRA",
}
XLABS = re.compile(r"_lora[12]\.(down|up)\.weight$")  # two LoRAs beside a processor, in files of XLabs for FLUX.1
ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.([^.]+)\.(weight|bias)$|\.(lora_magnitude_vector)\.([^.]+)(?:\.weight)?$")
WORD = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<encoder>string_to_param\.\*|clip_l|clip_g|[^.]+)$")
WORD_ENCODERS = {"string_to_param.*": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
# What compilers and wrappers put between the names of modules, and PEFT's own
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|base_model\.model|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
# beginning of a layer's name -> the parts that it may be in; DENOISER: whichever the pipeline has. Longer ones stand first.
DENOISER = "unet or transformer"
PREFIXES: dict[str, tuple[str, ...]] = {
    "model.diffusion_model.": (DENOISER,),
    "diffusion_model.": (DENOISER,),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2"),
    "lora_transformer_": (DENOISER,),
    "lora_unet_": (DENOISER,),
    "oft_unet_": (DENOISER,),
    "lycoris_": (DENOISER, "text_encoder", "text_encoder_2", "text_encoder_3", "model"),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "lora_te_": ("text_encoder",),
    "transformer.": ("transformer",),
    "unet.": ("unet",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    "model.": ("model",),
}
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_name(name: str) -> tuple[str, str, str] | None:
    """(layer, role, adapter's name inside) of a tensor's name; None for a name that no tool is known to write.

    A role that is a kind of UNREAD begins with '!'; behind ' | ' stands which of its tensors it is.
    """
    inner = ""
    if found := ADAPTER_NAME.search(name):
        inner = found[2] or found[5]
        name = name[: found.start()] + (f".{found[1]}.{found[3]}" if found[1] else f".{found[4]}")
        inner = "" if inner == "weight" else inner
    for start in ending_starts(name):
        ending = name[start:]
        if ending in ENDINGS:
            return name[:start], ENDINGS[ending], inner
        if ending in UNREAD:
            return name[:start], f"!{UNREAD[ending]}", inner
    for ending in ("_lora.down.weight", "_lora.up.weight"):
        if name.endswith(ending):
            return name.removesuffix(ending), ENDINGS[ending], inner
    if found := XLABS.search(name):
        return name[: found.start()], f"!XLabs' LoRA of FLUX.1 | {found[0]}", inner
    return None


def ending_starts(name: str) -> list[int]:
    """Where the last three words of a name begin, the longest ending first."""
    starts, at = [], len(name)
    for _ in range(3):
        at = name.rfind(".", 0, at)
        if at < 0:
            break
        starts.append(at)
    return starts[::-1]


def unwrap(name: str) -> str:
    """A layer's name without what compilers and wrappers put into it."""
    return WRAPPERS.sub("", name)


def layer_candidates(layer: str) -> list[tuple[tuple[str, ...], str]]:
    """(parts, name in the part) that a file's layer may mean, the likeliest first; parts () for any part."""
    found: list[tuple[tuple[str, ...], str]] = []
    bare = unwrap(layer)
    for name in dict.fromkeys((layer, bare)):
        for prefix, parts in PREFIXES.items():
            if name.startswith(prefix):
                found.append((parts, unwrap(name.removeprefix(prefix))))
    found.append(((), bare))
    return [(parts, own) for parts, name in found for own in dict.fromkeys((name, modern_name(name)))]


def modern_name(name: str) -> str:
    """The name of a layer for one that diffusers' first training scripts wrote: attn1.processor.to_out -> attn1.to_out.0."""
    head, dot, last = name.rpartition(".")
    if head.endswith(".processor"):
        return f"{head.removesuffix('.processor')}.{'to_out.0' if last == 'to_out' else last}"
    if head.endswith("self_attn") and last in OLD_TEXT_NAMES:
        return f"{head}{dot}{OLD_TEXT_NAMES[last]}"
    return name
