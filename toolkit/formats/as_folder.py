"""Any adapter as an adapter folder of ours, which is what sampling takes: a run's, a folder, or anybody's LoRA file.

A file is read once for each base and kept in the cache. A layer that it changes by a matrix of full rank becomes LoRA of as high a
rank as the matrix has.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..adapters.approximate import low_rank
from ..core.cache import cache_key
from ..core.files import write_text
from ..core.paths import cache_folder
from ..core.systems import retry_while_locked
from . import native
from .read import read_lora
from .source import adapter_path, content_hash, file_changes, is_native
from .write import Part, peft_state


def check_adapter(path: Path) -> None:
    """Raises UserError when there is no adapter at a path, without a model."""
    place = adapter_path(path)
    if not is_native(place):
        read_lora(place)


def adapter_folder(path: Path, pipe: Any) -> Path:
    """The folder of an adapter for a pipeline without adapters.

    Raises:
        UserError: when there is no adapter, or a file was made for another base.
    """
    place = adapter_path(path)
    if is_native(place):
        return place
    folder = cache_folder() / "adapters" / cache_key(hash=content_hash(place), base=str(pipe.name_or_path))[:32]
    if not folder.is_dir():
        write_peft_folders(place, pipe, folder)
    return folder


def write_peft_folders(file: Path, pipe: Any, folder: Path) -> None:
    """Writes a LoRA file's changes of a pipeline's layers as PEFT folders, whole or not at all, whoever else does so too."""
    changes = file_changes(file, pipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        for name, folded in changes.items():
            part = Part(getattr(pipe, name), folded, "")
            short = {
                layer: low_rank(change, part.layer(layer).weight.detach().flatten(1).float().cpu())[0]  # type: ignore[union-attr]
                for layer, change in folded.items()
            }
            native.write_state(whole / name, *peft_state(Part(part.model, short, "")))
        write_text(whole / "rankfold.json", json.dumps({"adapter": "lora", "file": file.name}))
        try:
            retry_while_locked(lambda: whole.rename(folder))
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
