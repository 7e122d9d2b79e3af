"""Tensors on disk under a key that names everything they depend on; a changed image or model is another key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .errors import UserError
from .files import write_atomic

FORMAT = 2  # to be raised when the same inputs come to make other tensors, so that older entries are not taken
FULL_HASH_LIMIT = 1 << 26  # bytes up to which `sampled_hash` reads all of a file
SAMPLES, BLOCK = 64, 1 << 16


def cache_key(**parts: Any) -> str:
    """A key from named parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """The tensors under `key`, made by `make` when they are not there, or not as they were written under this very key.

    A cache that cannot be written to is done without.
    """
    path = folder / f"v{FORMAT}" / key[:2] / f"{key}.safetensors"
    if (found := read_entry(path, key)) is not None:
        return found
    tensors = {name: value.contiguous() for name, value in make().items()}
    try:
        write_atomic(path, save(tensors, metadata={"sha256": entry_hash(key, tensors)}))
    except UserError as error:
        tell_unwritable(str(error.__cause__ or error))
    return tensors


@cache
def tell_unwritable(reason: str) -> None:
    """Says once that what is computed is not kept."""
    print(
        f"rankfold: the cache cannot be written ({reason}): going on without it. $RANKFOLD_CACHE names another folder."
    )


def read_entry(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of an entry, or None where there is none, or it is damaged or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None
    return tensors if expected == entry_hash(key, tensors) else None


def entry_hash(key: str, tensors: dict[str, torch.Tensor]) -> str:
    """Hash of tensors with their names, dtypes and shapes, and of the key that they belong to."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
