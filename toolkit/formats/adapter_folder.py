"""What a folder that holds an adapter consists of, ours and PEFT's: names, configs and tensors. Nothing of PEFT is imported here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.errors import UserError
from ..core.records import parse_json_object
from ..diffusion import textual_inversion as new_words

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLE = "adapter_model.bin"  # of older releases of PEFT


def is_native(path: Path) -> bool:
    """Whether this is an adapter folder of ours."""
    return any((path / part / WEIGHTS).is_file() for part in PARTS)


def is_peft_folder(folder: Path) -> bool:
    """Whether this is one adapter in PEFT's layout, not one of ours with a folder for each part."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLE))


def check_adapter_folder(folder: Path) -> list[str]:
    """The parts an adapter folder holds.

    Raises:
        UserError: when it holds none.
    """
    parts = [part for part in PARTS if (folder / part / WEIGHTS).is_file()]
    if not parts:
        raise UserError(
            f"{folder} holds no adapter: no folder such as unet/ or model/ with {WEIGHTS} is in it. Has the run finished?"
        )
    return parts


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}).") from error
    return parse_json_object(text, str(path))


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors.

    Raises:
        UserError: when the file is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupted ({error}); copy it again, or take an earlier checkpoint.") from error


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter folder's weights and configs."""
    digest = hashlib.sha256()
    for part in check_adapter_folder(folder):
        for name in (CONFIG, WEIGHTS):
            digest.update((folder / part / name).read_bytes())
    if (folder / new_words.FILE).is_file():
        digest.update((folder / new_words.FILE).read_bytes())
    return digest.hexdigest()[:16]
