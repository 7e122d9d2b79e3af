"""The sizes in pixels that training images are brought to."""

from __future__ import annotations

import math
from pathlib import Path

from ...toolkit.data.images import image_size
from ...toolkit.data.subjects import Sample, sample_size
from ...toolkit.diffusion.model import DiffusionModel
from ..config.images import DiffusionConfig

Size = tuple[int, int]  # width, height


def square_size(config: DiffusionConfig, model: DiffusionModel) -> Size:
    """The size of images that do not keep their own shape, and of images that are made."""
    side = config.resolution or model.native_resolution
    return side, side


def trained_sizes(config: DiffusionConfig, sample: Sample, model: DiffusionModel) -> list[Size]:
    """The sizes at which an image is trained, one for each resolution; each but once, where two come to the same."""
    unit = model.latent_scale * model.patch_size
    sides = (square_size(config, model)[0], *config.extra_resolutions)
    if config.crop != "bucket":
        return [(side, side) for side in dict.fromkeys(sides)]
    shape = sample_size(sample)
    return list(dict.fromkeys(bucket_size(*shape, side, unit) for side in sides))


def reference_size(config: DiffusionConfig, path: Path, size: Size, model: DiffusionModel) -> Size:
    """The size of a reference of an image of `size`: the same, or with buckets about as many pixels in its own shape.

    Where the stock pipeline scales references by itself it is what comes of that.
    """
    if own := model.own_reference_size(image_size(path)):
        return own
    if config.crop != "bucket":
        return size
    unit = model.latent_scale * model.patch_size
    return bucket_size(*image_size(path), round(math.sqrt(size[0] * size[1])), unit)


def bucket_size(width: int, height: int, side: int, unit: int) -> Size:
    """The size that an image is brought to: its own shape as near as multiples of `unit` allow, about side x side in area.

    Shapes beyond 2 : 1 are cut to that.
    """
    shape = min(max(width / height, 0.5), 2.0)
    across = max(1, round(side * math.sqrt(shape) / unit))
    choices = [(across, down) for down in (int(side * side / (across * unit * unit)), round(across / shape)) if down]
    best = min(choices, key=lambda c: (abs(math.log(c[0] / c[1] / shape)), -c[0] * c[1]))
    return best[0] * unit, best[1] * unit
