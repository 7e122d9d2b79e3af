"""Any adapter as an adapter folder of ours, which is what sampling takes: a run's, a folder, or anybody's LoRA file.

A file is read once for each base and kept in the cache, as the changes that it makes (adapters/variants/fixed.py): factors stay factors,
and a whole matrix stays one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapters.change import Change
from ..adapters.variants.fixed import FixedConfig
from ..core.cache import cache_key
from ..core.files import write_text
from ..core.paths import cache_folder
from ..core.systems import retry_while_locked
from ..diffusion.textual_inversion import save_token_embeddings
from . import native
from .adapter_facts import AdapterFacts
from .read import read_lora
from .source import AdapterSource, adapter_path, content_hash, file_source, is_native

READER = 1  # raised when files come to be read otherwise, so that no change of an older reading is used again
NOTES = "notes.json"  # what of the file is left out


def check_adapter(path: Path) -> None:
    """Raises UserError when there is no adapter at a path, without a model."""
    place = adapter_path(path)
    if not is_native(place):
        read_lora(place)


def adapter_folder(path: Path, pipe: Any, *, ignore_unused: bool = False) -> Path:
    """The folder of an adapter for a pipeline without adapters. What of a file is left out is said on stderr.

    Raises:
        UserError: when there is no adapter, a file was made for another base, or a part of it has no place in this one and
            ignore_unused is not set.
    """
    place = adapter_path(path)
    if is_native(place):
        return place
    key = cache_key(
        hash=content_hash(place), base=base_state(Path(pipe.name_or_path)), reader=READER, all=not ignore_unused
    )
    folder = cache_folder() / "adapters" / key[:32]
    if not folder.is_dir():
        write_folder(place.name, file_source(place, pipe, ignore_unused=ignore_unused), folder)
    for note in json.loads((folder / NOTES).read_text(encoding="utf-8")):
        print(f"rankfold: {note}", file=sys.stderr)
    return folder


def base_state(base: Path) -> list[tuple[str, int, int]]:
    """Files of a base with their sizes and times: a change may depend on the weights that it was read for."""
    files = sorted(
        file for file in base.rglob("*") if file.suffix in (".safetensors", ".bin", ".json") and file.is_file()
    )
    return [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]


def write_folder(name: str, source: AdapterSource, folder: Path) -> None:
    """Writes a file's changes as an adapter folder, whole or not at all, whoever else does so too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        for part, folded in source.parts.items():
            native.write_state(whole / part, *fixed_state(folded))
        if source.token_embeddings:
            save_token_embeddings(whole, source.token_embeddings)
        AdapterFacts(adapter="lora", file=name).save(whole)
        write_text(whole / NOTES, json.dumps(source.notes))
        try:
            retry_while_locked(lambda: whole.rename(folder))
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def fixed_state(folded: dict[str, Change]) -> tuple[dict[str, torch.Tensor], FixedConfig]:
    """Tensors and config of a part's changes."""
    state: dict[str, torch.Tensor] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for layer, change in folded.items():
        tensors = {
            name: tensor for name in ("down", "up", "dense", "bias") if (tensor := getattr(change, name)) is not None
        }
        # Copies, since split layers share factors; whole matrices in the least dtype that holds them exactly.
        state |= {
            f"{layer}.fixed_{name}": narrow(tensor) if name == "dense" else tensor.float().clone()
            for name, tensor in tensors.items()
        }
        shapes[layer] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return state, FixedConfig(target_modules=list(folded), shapes=shapes)


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whatever its shape, in bfloat16 where that says the same to the bit, as of files that were saved so; else in fp32."""
    half = tensor.to(torch.bfloat16)
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor.float().clone()
