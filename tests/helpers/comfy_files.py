"""Bases in files as people have them for ComfyUI: original names, a file for each part, weights quantised in its ways."""

import json
import re
import shutil

import diffusers
import torch
from safetensors.torch import load_file, save_file

from rankfold.toolkit.diffusion.base_files import BaseFiles
from rankfold.toolkit.diffusion.families import family_of_denoiser

VAE_NAMES = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
NORMS = {  # what the tables of layers, which are for adapters, leave out: our names -> theirs
    "SD3Transformer2DModel": {
        r"pos_embed\.pos_embed": "pos_embed",
        r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.weight": r"joint_blocks.\1.x_block.\2.ln_\3.weight",
        r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight": r"joint_blocks.\1.context_block.attn.ln_\2.weight",
    },
    "Flux2Transformer2DModel": {
        r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
        r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
        r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
        r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
        r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
        r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    },
    "Krea2Transformer2DModel": {
        r"(.*)\.attn\.norm_([qk])\.weight": r"\1.attn.qknorm.\2norm.scale",
        r"(.*)\.norm1\.weight": r"\1.prenorm.scale",
        r"(.*)\.norm2\.weight": r"\1.postnorm.scale",
        r"(.*blocks.*)\.scale_shift_table": r"\1.mod.lin",
        r"txt_in\.norm\.weight": "txtmlp.0.scale",
        r"final_layer\.norm\.weight": "last.norm.scale",
        r"final_layer\.scale_shift_table": "last.modulation.lin",
    },
}  # fmt: skip
NORMS["FluxTransformer2DModel"] = NORMS["Flux2Transformer2DModel"]
KREA_BLOCKS = {"transformer_blocks.": "blocks.", "text_fusion.": "txtfusion."}


def tensors(folder, part):
    """The tensors of a part, of however many files."""
    return {name: value for file in (folder / part).glob("*.safetensors") for name, value in load_file(file).items()}


def original_denoiser(folder):
    """The denoiser's tensors by their original names."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, index["transformer"][1])
    model, own = kind.from_pretrained(folder, subfolder="transformer"), tensors(folder, "transformer")
    found, used = {}, set()
    for theirs, layer in family_of_denoiser(model).original_layers(model).items():
        for end in ("weight", "bias"):
            keys = [f"{name}.{end}" for name in layer.layers]
            if all(key in own for key in keys):
                rows = torch.cat([own[key] for key in keys])
                end = "scale" if theirs.endswith(("query_norm", "key_norm")) else end
                found[f"{theirs}.{end}"] = torch.cat(rows.chunk(2)[::-1]) if layer.swapped else rows
                used.update(keys)
    for key in own.keys() - used:
        name = key
        for ours, theirs in NORMS.get(kind.__name__, {}).items():
            if re.fullmatch(ours, key):
                name = re.sub(ours, theirs, key)
                break
        value = own[key]
        if kind is diffusers.Krea2Transformer2DModel:
            for ours, theirs in KREA_BLOCKS.items():
                name = name.replace(ours, theirs)
            value = value.flatten() if name.endswith(".mod.lin") else value
        found[name] = value
    return {name: value.contiguous() for name, value in found.items()}


def vae_name(name, blocks):
    """Stable Diffusion's name of a tensor of its autoencoder."""
    for ours, theirs in VAE_NAMES.items():
        name = name.replace(ours, theirs)
    words = name.split(".")
    side, rest = words[0], words[1:]
    if rest and rest[0] == "mid_block":
        place = f"mid.block_{int(rest[2]) + 1}" if rest[1] == "resnets" else "mid.attn_1"
        rest = [{"to_q": "q", "to_k": "k", "to_v": "v"}.get(rest[3], rest[3]), *rest[4:]]
    elif rest and rest[0] in ("down_blocks", "up_blocks"):
        way = rest[0].removesuffix("_blocks")
        number = int(rest[1]) if way == "down" else blocks - 1 - int(rest[1])
        place = f"{way}.{number}.{f'block.{rest[3]}' if rest[2] == 'resnets' else way + 'sample'}"
        rest = rest[4:]
    else:
        return name
    return ".".join([side, place, *rest])


WAN = {
    r"(encoder|decoder)\.mid_block\.resnets\.0": r"\1.middle.0",
    r"(encoder|decoder)\.mid_block\.attentions\.0": r"\1.middle.1",
    r"(encoder|decoder)\.mid_block\.resnets\.1": r"\1.middle.2",
    r"(encoder|decoder)\.conv_in": r"\1.conv1",
    r"(encoder|decoder)\.norm_out": r"\1.head.0",
    r"(encoder|decoder)\.conv_out": r"\1.head.2",
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"encoder\.down_blocks\.": "encoder.downsamples.",
    r"\.norm1\.": ".residual.0.",
    r"(middle\.[02]|samples\.\d+)\.conv1\.": r"\1.residual.2.",
    r"\.norm2\.": ".residual.3.",
    r"(middle\.[02]|samples\.\d+)\.conv2\.": r"\1.residual.6.",
    r"\.conv_shortcut\.": ".shortcut.",
}


def wan_name(name):
    """Wan's name of a tensor of its autoencoder, which Qwen-Image has."""
    if place := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", name):
        number = 4 * int(place[1]) + (int(place[3]) if place[2] == "resnets" else 3)
        name = f"decoder.upsamples.{number}{name[place.end() :]}"
    for ours, theirs in WAN.items():
        name = re.sub(ours, theirs, name)
    return name


def original_vae(folder):
    """The autoencoder's tensors by their original names."""
    config = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))
    own = tensors(folder, "vae")
    if config["_class_name"] == "AutoencoderKLQwenImage":
        return {wan_name(name): value for name, value in own.items()}
    found = {}
    for name, value in own.items():
        theirs = vae_name(name, len(config["block_out_channels"]))
        if config["_class_name"] == "AutoencoderKLFlux2":
            theirs = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}.get(
                theirs.split(".")[0], theirs.split(".")[0]
            ) + theirs[len(theirs.split(".")[0]) :]
        square = ".attn_1." in theirs and value.dim() == 2  # 1 x 1 convolutions there, linear layers here
        found[theirs] = (value[..., None, None] if square else value).contiguous()
    return found


def quantize(state, dialect):
    """The tensors with matrices in 8 bit as ComfyUI has them, and what they then mean. dialect: old, new, rows, int8 or blocks."""
    written, meant = {}, {}
    dtype = torch.int8 if dialect in ("int8", "blocks") else torch.float8_e4m3fn
    most = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    for name, value in state.items():
        if value.dim() != 2 or not name.endswith(".weight") or not value.is_floating_point() or value.shape[0] % 2:
            written[name] = meant[name] = value
            continue
        layer, fine = name.removesuffix(".weight"), value.float()
        if dialect == "blocks" and value.shape[1] % 2 == 0:
            peaks = fine.reshape(2, value.shape[0] // 2, 2, value.shape[1] // 2).abs().amax((1, 3))
        else:
            peaks = fine.abs().amax(1, keepdim=True) if dialect in ("rows", "blocks") else fine.abs().max()
        scale = (peaks / most).clamp(min=1e-8)
        whole = scale
        for dim in range(scale.dim()):
            whole = whole.repeat_interleave(value.shape[dim] // whole.shape[dim], dim)
        cells = fine / whole
        written[name] = cells.round().to(dtype) if dtype is torch.int8 else cells.to(dtype)
        meant[name] = (written[name].float() * whole).to(value.dtype)
        if dialect == "old":
            written |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        else:
            written[f"{layer}.weight_scale"] = scale
            kind = {"int8": "int8_tensorwise", "blocks": "int8_blockwise"}.get(dialect, "float8_e4m3fn")
            written[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps({"format": kind}).encode()), dtype=torch.uint8
            )
    if dialect == "old":
        written["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return written, meant


def comfy_base(folder, out, *, dialect=None, meant=False, prefix=""):
    """The files of a base folder, apart, and a folder with its configs and tokenizers alone: the base's name.

    dialect: how denoiser and text encoders are quantised. meant: write what those weights mean, in floating point.
    """
    out.mkdir(parents=True)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    encoders = [name for name, value in index.items() if name.startswith("text_encoder") and value[0] == "transformers"]
    states = {"transformer": {prefix + name: value for name, value in original_denoiser(folder).items()}}
    states |= {name: tensors(folder, name) for name in encoders} | {"vae": original_vae(folder)}
    for name, state in states.items():
        if dialect and name != "vae":
            state = quantize(state, dialect)[meant]
        save_file({key: value.contiguous() for key, value in state.items()}, out / f"{name}.safetensors")
    layout = shutil.copytree(folder, out / "layout", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    denoiser, *texts, vae = (str(out / f"{name}.safetensors") for name in states)
    return BaseFiles(denoiser, vae, tuple(texts), str(layout))
