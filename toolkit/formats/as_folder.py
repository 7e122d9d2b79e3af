"""Any adapter as an adapter folder of ours, which is what sampling takes: a run's, a folder, or anybody's LoRA file.

A file is read once for each base and kept in the cache, as the changes that it makes (adapters/variants/fixed.py): factors stay factors,
and a whole matrix stays one.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapters.variants.fixed import FixedConfig
from ..core.cache import cache_key, file_hash
from ..core.change import Change
from ..core.errors import UserError
from ..core.files import write_text
from ..core.paths import cache_folder
from ..core.records import read_record
from ..core.systems import retry_while_locked
from ..diffusion.textual_inversion import save_token_embeddings
from . import native
from .adapter_facts import AdapterFacts
from .adapter_folder import is_native
from .locate import adapter_path, content_hash
from .read import read_lora
from .source import AdapterSource, file_source

READER = 2  # raised when files come to be read otherwise, so that no change of an older reading is used again
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
    notes = read_notes(folder)
    if notes is None:
        source = file_source(place, pipe, ignore_unused=ignore_unused, hold=narrow_dense)
        notes = source.notes
        write_folder(place.name, source, folder)
    for note in notes:
        print(f"rankfold: {note}", file=sys.stderr)
    return folder


def read_notes(folder: Path) -> list[str] | None:
    """The notes of a folder in the cache; None where there is none, or it is not as it was written."""
    record = read_record(folder / NOTES)
    try:
        whole = record is not None and record.get("files") == file_hashes(folder)
    except OSError:
        return None
    return record["notes"] if record is not None and whole else None


def file_hashes(folder: Path) -> dict[str, str]:
    """Hashes of all files of a folder but its notes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != NOTES)
    return {file.relative_to(folder).as_posix(): file_hash(file) for file in files}


def base_state(base: Path) -> list[tuple[str, int, int]]:
    """Files of a base with their sizes and times: a change may depend on the weights that it was read for."""
    files = sorted(
        file for file in base.rglob("*") if file.suffix in (".safetensors", ".bin", ".json") and file.is_file()
    )
    return [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]


def write_folder(name: str, source: AdapterSource, folder: Path) -> None:
    """Writes a file's changes as an adapter folder, whole or not at all, whoever else does so too."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache {folder.parent} cannot be written: {error.strerror or error}. $RANKFOLD_CACHE names another folder."
        ) from error
    with TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        for part, folded in source.parts.items():
            native.write_state(whole / part, *fixed_state(folded))
        if source.token_embeddings:
            save_token_embeddings(whole, source.token_embeddings)
        AdapterFacts(adapter="lora", file=name).save(whole)
        write_text(whole / NOTES, json.dumps({"notes": source.notes, "files": file_hashes(whole)}))
        if folder.exists() and read_notes(folder) is None:  # damaged
            shutil.rmtree(folder, ignore_errors=True)
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
        # Copies, since split layers share factors.
        state |= {f"{layer}.fixed_{name}": t if name == "dense" else t.float().clone() for name, t in tensors.items()}
        shapes[layer] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return state, FixedConfig(target_modules=list(folded), shapes=shapes)


def narrow_dense(change: Change) -> Change:
    """The change with a whole matrix (out, in) in bfloat16 where that says the same to the bit, as of files saved so; else in fp32."""
    if change.dense is None or change.dense.dtype == torch.bfloat16:
        return change
    half = change.dense.to(torch.bfloat16)
    same = torch.equal(half.to(change.dense.dtype), change.dense)
    return replace(change, dense=half if same else change.dense.float().contiguous())
