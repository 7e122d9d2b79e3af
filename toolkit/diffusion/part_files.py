"""One part of a pipeline from a file of its own, under the names that its original code or ComfyUI gives its tensors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from .model import is_part
from .quantized_files import SCALES, common_dtype, dequantize

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
EMBEDDINGS = (("token_embedding.weight", "CLIP"), ("shared.weight", "T5"), ("embed_tokens.weight", ""))
"""How the name of the table of words ends -> how the class of such a text encoder begins."""
WIDTHS = ("hidden_size", "d_model")
OPTIONAL = ("lm_head.",)  # of language models, whose words no pipeline reads

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PartFile:
    """A file that one part comes from."""

    name: str
    """The part's name, such as text_encoder_2."""
    file: Path
    state: State


def read_tensors(file: Path) -> State:
    """The tensors of a file, dequantised; a pickled one is read without running what is in it.

    Raises:
        UserError: for a file that cannot be read, or is quantised in a way that is not known.
    """
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint
    from safetensors import safe_open

    try:
        state: Any = load_single_file_checkpoint(str(file), local_files_only=True)
        header: dict[str, str] = {}
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
    except Exception as error:
        raise UserError(f"{file} cannot be read as a checkpoint ({type(error).__name__}): is it complete?") from error
    return dequantize({name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, file, header)


def is_quantized_file(file: Path) -> bool:
    """Whether a file holds quantised weights, as far as its table of contents says."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return False
    with safe_open(file, framework="pt") as opened:
        kinds = ((name, opened.get_slice(name).get_dtype()) for name in opened.keys())  # noqa: SIM118
        return any(kind.startswith(("F8", "I8", "U8")) or name.endswith(SCALES) for name, kind in kinds)


def scale_names(file: Path) -> Iterator[str]:
    """Names of the scales of quantised weights in a safetensors file; none where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield from (name for name in opened.keys() if name.endswith(SCALES))  # noqa: SIM118
    except (SafetensorError, OSError):
        return


def without_prefix(state: State) -> State:
    """A denoiser's tensors without the prefix that all of them have in files for ComfyUI."""
    for prefix in DENOISER_PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


# ---------------------------------------------------------------------------------------------- which file is which part


def match_files(vae: Path | None, text_encoders: Sequence[Path], layout: Path, found: list[PartFile]) -> list[PartFile]:
    """What part each file is: text encoders are told by their kind and width, and by the order where these are alike.

    found: where the parts are put, too.

    Raises:
        UserError: for a file that is no text encoder of this pipeline.
    """
    index = json.loads((layout / "model_index.json").read_text(encoding="utf-8"))
    found += [PartFile("vae", vae, read_tensors(vae))] if vae else []
    slots = {
        name: (encoder_kind(value[1]), encoder_width(layout / name), value[1])
        for name, value in index.items()
        if name.startswith("text_encoder") and is_part(value) and value[0]
    }
    for file in text_encoders:
        state = read_tensors(file)
        end, kind = next(((end, kind) for end, kind in EMBEDDINGS for name in state if name.endswith(end)), ("", ""))
        width = next((value.shape[1] for name, value in state.items() if end and name.endswith(end)), 0)
        name = next((name for name, slot in slots.items() if slot[:2] == (kind, width)), None)
        if name is None:
            wanted = ", ".join(f"{slot[2]} of width {slot[1]}" for slot in slots.values()) or "no other"
            what = f"{kind or 'language model'} of width {width}" if width else "no text encoder that is known"
            raise UserError(f"--text-encoder {file} is a {what}, and the base takes {wanted}.")
        del slots[name]
        found.append(PartFile(name, file, state))
    return found


def encoder_kind(name: str) -> str:
    """How the class of a text encoder begins: CLIP, T5 or '' (language models)."""
    return next((kind for kind in ("CLIP", "T5") if name.startswith(kind)), "")


def encoder_width(folder: Path) -> int:
    """The width of a text encoder by its config, 0 where it says none."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = [config, config.get("text_config") or {}]
    return next((values[name] for values in reversed(own) for name in WIDTHS if name in values), 0)


# ---------------------------------------------------------------------------------------------- from tensors to a part


def build_part(part: PartFile, index: dict[str, Any], layout: Path) -> nn.Module:
    """The part with the file's weights, in the dtype that they are in.

    Raises:
        UserError: for a file that does not hold the whole part.
    """
    from diffusers.loaders.single_file import SingleFileComponentError

    library, name = index[part.name]
    kind = getattr(importlib.import_module(library), name)
    dtype = common_dtype(part.state)
    try:
        build = build_text_encoder if library == "transformers" else build_diffusers_part
        model = build(kind, part, layout, dtype)
    except (SingleFileComponentError, ValueError, RuntimeError, OSError, KeyError, AttributeError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{part.file} is no {name} as the configs in {layout} describe it ({first}): give the file that belongs to this base, or "
            "another --layout."
        ) from error
    spare = sum(value.numel() for value in part.state.values()) - sum(v.numel() for v in model.state_dict().values())
    if spare > 0:
        print(f"{part.file} holds {spare} numbers more than a {name} has: they are not used.")
    return model


def build_text_encoder(kind: Any, part: PartFile, layout: Path, dtype: torch.dtype) -> nn.Module:
    """By transformers, which knows the names that its own models once had."""
    config = kind.config_class.from_pretrained(layout / part.name)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=part.state, dtype=dtype, output_loading_info=True
    )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(OPTIONAL))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} among them")
    return model


def build_diffusers_part(kind: Any, part: PartFile, layout: Path, dtype: torch.dtype) -> nn.Module:
    """By diffusers' converters of original names."""
    from accelerate import init_empty_weights

    state = dict(without_prefix(part.state))  # converters take tensors out of it
    if kind.__name__ == "UNet2DConditionModel" and not any(name.startswith("down_blocks.") for name in state):
        state = {
            DENOISER_PREFIXES[0] + name: value for name, value in state.items()
        }  # by which its converter knows them
    config = kind.load_config(layout, subfolder=part.name)
    if (convert := CONVERTERS.get(kind.__name__)) is None:
        model = kind.from_single_file(
            state, config=str(layout), subfolder=part.name, dtype=dtype, local_files_only=True
        )
        missing = [name for name, value in model.named_parameters() if value.is_meta]
    else:
        with init_empty_weights():
            model = kind.from_config(config)
        own = model.state_dict().keys()
        state = state if own <= state.keys() else convert(state, config)
        report = model.load_state_dict(
            {name: value.to(dtype) for name, value in state.items() if name in own}, assign=True, strict=False
        )
        missing = report.missing_keys
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} among them")
    return model.eval()


def convert_wan_autoencoder(state: State, config: dict[str, Any]) -> State:
    """Qwen-Image's autoencoder, which is Wan's."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(dict(state))


def convert_flux_2_autoencoder(state: State, config: dict[str, Any]) -> State:
    """FLUX.2's: Stable Diffusion's names, two layers inside encoder and decoder, and the statistics that latents are normalised by."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    renamed = {name.replace("encoder.quant_conv", "quant_conv").replace("decoder.post_quant_conv", "post_quant_conv"): value
               for name, value in state.items()}  # fmt: skip
    return convert_ldm_vae_checkpoint(renamed, config) | {n: v for n, v in renamed.items() if n.startswith("bn.")}


CONVERTERS: dict[str, Callable[[State, dict[str, Any]], State]] = {
    "AutoencoderKLQwenImage": convert_wan_autoencoder,
    "AutoencoderKLFlux2": convert_flux_2_autoencoder,
}
"""Converters of parts for which diffusers has no from_single_file."""
