"""Quantised weights in files for ComfyUI (`fp8_scaled`, int8): turned back into floating point, or refused.

A quantised weight W stands beside its scale: W = values * scale, the scale one number, one for each row, or one for each block of rows
and columns. Files name it `layer.scale_weight` (with an empty tensor `scaled_fp8` that says so) or `layer.weight_scale` (with
`layer.comfy_quant`, or an entry in the header, that says the format). Whoever overlooks it has weights that are off by orders of
magnitude and still load.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError

SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")  # the last multiplies, too, whatever its name says
MARKS = ("scaled_fp8", "comfy_quant", "scale_input", "input_scale", "spiece_model", "tekken_model")
"""Last words of names of tensors that are no weights: formats, scales of activations, tokenizers."""
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
PLAIN = (
    "format",
    "full_precision_matrix_mult",
    "group_size",
)  # what an entry may say of a layer that is values * scale
EIGHT_BIT = tuple(
    t for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz") if (t := getattr(torch, n, None))
)
WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32)
CURE = "take a file of the same model in bf16, fp16 or fp8_scaled"


def dequantize(
    state: dict[str, torch.Tensor], file: Path, header: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors with each weight as it is meant, under its own name, and without scales and marks.

    They get the dtype that most others of the file have, bf16 where there are no others. header: the safetensors file's metadata.

    Raises:
        UserError: for a format that is not values times scale, and for quantised values without a scale that they need.
    """
    check_formats(state, file, header or {})
    dtype = common_dtype(state)
    found: dict[str, torch.Tensor] = {}
    scales = {
        name[: name.index(end)] + ".weight": value
        for name, value in state.items()
        for end in SCALES
        if name.endswith(end)
    }
    for name, value in state.items():
        if name.endswith(SCALES) or name.rpartition(".")[2] in MARKS:
            continue
        scale = scales.pop(name, None)
        if scale is not None:
            found[name] = scaled(value, scale, name, file).to(dtype)
        elif value.dtype in EIGHT_BIT:
            found[name] = value.to(dtype)
        elif value.dtype in WHOLE and value.dim() > 1 and not name.endswith("position_ids"):
            raise UserError(
                f"{file}: {name} holds whole numbers ({str(value.dtype).removeprefix('torch.')}) and the file no scale for them: {CURE}."
            )
        else:
            found[name] = value
    if scales:
        raise UserError(f"{file} holds a scale for {next(iter(scales))}, which is not in it: is the file complete?")
    return found


def scaled(values: torch.Tensor, scale: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    """values (out, in, ...) times scale: one number, (out,), or one for each block, (rows, columns); fp32."""
    factor = scale.float() if scale.dtype in (torch.float32, torch.float16, torch.bfloat16) else scale[..., None][:0]
    if factor.numel() == 1:
        return values.float() * factor.reshape(())
    if factor.dim() == 1 and len(factor) == len(values):
        return values.float() * factor.view(-1, *[1] * (values.dim() - 1))
    blocks = values.dim() == factor.dim() == 2 and factor.numel()
    if not blocks or any(whole % parts for whole, parts in zip(values.shape, factor.shape, strict=True)):
        raise UserError(
            f"{file}: the scale of {name} is {tuple(scale.shape)} in {str(scale.dtype).removeprefix('torch.')} and the weight "
            f"{tuple(values.shape)}, which is no known way to scale: {CURE}."
        )
    for dim in (0, 1):
        factor = factor.repeat_interleave(values.shape[dim] // factor.shape[dim], dim)
    return values.float() * factor


def common_dtype(state: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of most weights that are not quantised; bf16 where all are."""
    plain = [
        value.dtype
        for name, value in state.items()
        if value.is_floating_point() and value.dtype not in EIGHT_BIT and not name.endswith(SCALES) and name.rpartition(".")[2] not in MARKS
    ]  # fmt: skip
    return Counter(plain).most_common(1)[0][0] if plain else torch.bfloat16


def check_formats(state: dict[str, torch.Tensor], file: Path, header: dict[str, str]) -> None:
    """Raises UserError where a file says of a layer that it is quantised in a way that is more than values times scale."""
    said: dict[str, Any] = {}
    try:
        said |= json.loads(header.get("_quantization_metadata") or "{}").get("layers", {})
        for name, value in state.items():
            if name.endswith(".comfy_quant"):
                said[name.removesuffix(".comfy_quant")] = json.loads(bytes(value.to(torch.uint8).tolist()))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: what it says of its quantisation is not JSON: {CURE}.") from error
    for layer, entry in said.items():
        name = str(entry.get("format")) if isinstance(entry, dict) else str(entry)
        more = [key for key, value in entry.items() if key not in PLAIN and value] if isinstance(entry, dict) else []
        if name not in FORMATS or more:
            how = f"{name}{' with ' + ', '.join(more) if more else ''}"
            raise UserError(f"{file}: {layer} is quantised as {how}, which is not read: {CURE}.")
    for name in state:
        if any(
            mark in name
            for mark in ("quant_state", ".absmax", ".SCB", ".qweight", ".qzeros", "weight_zero_point", "weight_scale_2")
        ):
            raise UserError(
                f"{file}: {name} is of a quantisation that is not read (bitsandbytes, GPTQ, nvfp4, ...): {CURE}."
            )
