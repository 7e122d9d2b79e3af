"""Images that were made here: which there are, small versions of them, and one by its name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ....toolkit.core.errors import UserError
from ....toolkit.data.images import READ_ERRORS, open_image
from .paths import StudioPaths

SHOWN, SIDE = 36, 256  # images, pixels


def generated_files(paths: StudioPaths) -> list[Path]:
    """The images that were made here, the newest first."""
    return sorted(paths.generated_folder().glob("*.png"), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def generated_thumbnails(paths: StudioPaths) -> list[tuple[Any, str]]:
    """The newest images, small, with their names."""
    found = []
    for file in generated_files(paths)[:SHOWN]:
        try:
            found.append((thumbnail(file, file.stat().st_mtime_ns), file.name))
        except (*READ_ERRORS, Image.DecompressionBombError):
            continue
    return found


@lru_cache(maxsize=4 * SHOWN)
def thumbnail(file: Path, changed: int) -> Image.Image:
    """An image, small. changed: its age, so that another of its name is another."""
    with open_image(file) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def find_generated_image(paths: StudioPaths, name: str) -> str:
    """The path of an image that was made here.

    Raises:
        UserError: when there is none of that name.
    """
    known = {file.name: str(file) for file in generated_files(paths)}
    if name not in known:
        raise UserError(f"There is no image named {str(name)[:80]!r}: it was deleted, or never made here.")
    return known[name]
