"""Tensors on disk under a key that names everything they depend on; a changed image or model is another key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .files import write_atomic

FULL_HASH_LIMIT = 1 << 26  # bytes up to which `sampled_hash` reads all of a file
SAMPLES, BLOCK = 64, 1 << 16


def cache_key(**parts: Any) -> str:
    """A key from named parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled_hash(path: Path) -> str:
    """Hash of a file of weights that is quick however large it is: all of a small one, else size, beginning, and blocks from all over.

    The beginning of a safetensors file names its tensors. Weights that were trained on differ nearly everywhere.
    """
    size = path.stat().st_size
    if size <= FULL_HASH_LIMIT:
        return file_hash(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for number in range(SAMPLES):
            file.seek((size - BLOCK) * number // (SAMPLES - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def load_or_compute(folder: Path, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors under `key`, made by `make` when they are not there or cannot be read."""
    path = folder / key[:2] / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
    tensors = {name: value.contiguous() for name, value in make().items()}
    write_atomic(path, save(tensors))
    return tensors
