"""Images that others start from or refer to: kept beside what is made of them, by their content, so that it can be made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....toolkit.core.errors import UserError
from ....toolkit.core.files import write_atomic
from ....toolkit.data.image_folder import image_fault
from .paths import StudioPaths

FOLDER = "_from"  # in the folder of generated images


def keep_start(paths: StudioPaths, file: str | None, what: str) -> str:
    """The path of an uploaded image where it stays; '' for none.

    Raises:
        UserError: for what is no image.
    """
    if not file:
        return ""
    if fault := image_fault(Path(file)):
        raise UserError(f"{what} cannot be used: {fault}")
    data = Path(file).read_bytes()
    kept = paths.generated_folder() / FOLDER / f"{hashlib.sha256(data).hexdigest()[:32]}{Path(file).suffix.lower()}"
    if not kept.exists():
        write_atomic(kept, data)
    return str(kept)


def keep_references(paths: StudioPaths, given: Sequence[Any] | None) -> tuple[str, ...]:
    """The paths of reference images where they stay, in their order. given: files, or what a gallery holds (file, caption).

    Raises:
        UserError: for what is no image.
    """
    files = [one if isinstance(one, str) else one[0] for one in given or ()]
    return tuple(keep_start(paths, file, f"Reference {number}") for number, file in enumerate(files, 1))


def kept_start(paths: StudioPaths, path: str) -> str | None:
    """An image that a recipe starts from, where it is one of those kept here; None for none.

    Raises:
        UserError: for one that is not here. Nothing that lies elsewhere is looked at.
    """
    if not path:
        return None
    kept = paths.generated_folder() / FOLDER / Path(path).name
    if Path(path).parent != kept.parent or not kept.is_file():
        raise UserError(
            "The image that this one was made from is not here: `rankfold sample --from` repeats it where it lies."
        )
    return str(kept)
