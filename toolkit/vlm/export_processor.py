"""A base's processor as other tools shall load it, with what the training changed: limits of pixels, and padding to squares."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from PIL import Image

from .image_tokens import ImageTokens

PROBE = (96, 40)  # an image that is padded
SHARED = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb",
)  # fmt: skip


def padding_processor(processor: Any, images: ImageTokens) -> Any | None:
    """A copy of the processor that pads images to squares by itself, as training did; None where no class of transformers does.

    images: the training's own way, which the copy must agree with.
    """
    from transformers import LlavaImageProcessor

    own = processor.image_processor
    settings = {name: value for name in SHARED if (value := getattr(own, name, None)) is not None}
    try:
        padding = LlavaImageProcessor(**settings, do_pad=True)
        noise = np.random.default_rng(0).integers(0, 255, (PROBE[1], PROBE[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        wanted = own(images=[images.prepare(image)], return_tensors="np")["pixel_values"]
        found = padding(images=[image], return_tensors="np")["pixel_values"]
    except Exception:
        return None
    if np.shape(wanted) != np.shape(found) or not np.allclose(wanted, found, atol=1e-4):
        return None
    changed = copy.copy(processor)
    changed.image_processor = padding
    return changed
