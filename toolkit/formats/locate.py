"""The adapter that a path stands for, whatever it is: a run, a folder of ours, one of PEFT's, or a LoRA file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..core.errors import UserError
from ..core.paths import is_there
from ..core.run_folder import Run
from .adapter_facts import FILE, AdapterFacts, facts_of_header, read_facts
from .adapter_folder import CONFIG, WEIGHTS, adapter_hash, is_native, is_peft_folder
from .read import read_lora


def adapter_path(path: Path) -> Path:
    """The adapter behind a path: that of a run folder, or the path itself.

    Raises:
        UserError: when there is nothing, or the run is not done.
    """
    if not is_there(path):
        raise UserError(f"{path} does not exist: give a run folder, an adapter folder or a LoRA file.")
    run = Run(path)
    return run.finished_adapter() if run.config_file.is_file() else path


def adapter_facts(path: Path) -> AdapterFacts:
    """What an adapter says of itself: in rankfold.json of its folder, or in the header of its file.

    Raises:
        UserError: when what it says cannot be read.
    """
    if path.is_dir() and ((path / FILE).is_file() or is_native(path) or is_peft_folder(path)):
        return read_facts(path)
    return facts_of_header(read_lora(path).header)


def content_hash(path: Path) -> str:
    """Hash of the adapter at an `adapter_path`: of all that decides what it does.

    Raises:
        UserError: when there is none.
    """
    if is_native(path):
        return adapter_hash(path)
    file = read_lora(path).path
    digest = hashlib.sha256(file.read_bytes())
    if file.name == WEIGHTS and (file.parent / CONFIG).is_file():
        digest.update((file.parent / CONFIG).read_bytes())
    return digest.hexdigest()[:16]
