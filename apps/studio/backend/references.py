"""The photos that a run learns from, small, to stand beside its previews."""

from __future__ import annotations

from typing import Any

from ....toolkit.core.errors import UserError
from ....toolkit.data.images import load_rgb
from ....toolkit.data.subjects import find_samples
from ....training.config.images import DiffusionConfig
from .paths import StudioPaths

PHOTOS, SIDE = 6, 256  # how many, pixels


def reference_photos(paths: StudioPaths, name: str) -> list[Any]:
    """Some of a run's photos; none where it has none, or they are gone."""
    try:
        config = paths.config(name)
        if not isinstance(config, DiffusionConfig) or config.images is None or not config.images.is_dir():
            return []
        images = [load_rgb(sample.path) for sample in find_samples(config.images, skip_bad=True)[:PHOTOS]]
    except UserError:
        return []
    for image in images:
        image.thumbnail((SIDE, SIDE))
    return images
