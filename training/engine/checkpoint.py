"""Checkpoints: written whole, verified when they are read, and the newest whole one taken."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_atomic

FORMAT = 1  # of the state; raised when an older rankfold could not read it
KEYS = ("config", "step", "parameters", "optimizer", "schedule", "scaler", "average", "window", "window_steps")
READ_ERRORS = (
    OSError, RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError, AttributeError,
    TypeError, IndexError, NotImplementedError,
)  # fmt: skip


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a state whole or not at all.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    buffer = io.BytesIO()  # torch's own file writer hides what the system said of a full disk
    torch.save(state | {"format": FORMAT}, buffer)
    write_atomic(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that a checkpoint holds; every byte of it is held against the checksums that torch has written with it.

    Raises:
        DamagedError: for a file that is cut, changed, no checkpoint, or no file.
        UserError: for one that a newer rankfold has written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise DamagedError(f"{path} is damaged: {record} is not what was written.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise DamagedError(f"{path} is damaged, or no checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or (missing := [key for key in KEYS if key not in state]):
        what = "is no state" if not isinstance(state, dict) else f"lacks {missing[0]}"
        raise DamagedError(f"{path} is no checkpoint of a run: it {what}.")
    if state.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"{path} was written by a newer rankfold (format {state['format']}): update, or start a new run."
        )
    return state


def newest_checkpoint(files: Sequence[Path]) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest whole one of some checkpoints (the oldest first), its state, and a sentence for each newer one; None for none.

    Raises:
        UserError: when there are some and none is whole, or one is a newer rankfold's.
    """
    damaged: list[str] = []
    for path in reversed(files):
        try:
            return path, read_checkpoint(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{' '.join(damaged)} No checkpoint is left to go on from: start over with --overwrite.")
    return None
