"""The most and the fewest pixels that an image is given to a base with, by the rule of the base's own image processor.

The limits are put into the processor, so that whoever loads it (an exported model, another tool) keeps them.
"""

from __future__ import annotations

import math
from typing import Any

from ..core.errors import UserError


def limit_pixels(processor: Any, most: int | None, fewest: int | None) -> None:
    """Sets the limits of a processor's images, and of its videos where it has them.

    Raises:
        UserError: where the processor brings every image to one size, or cannot keep so few pixels.
    """
    if most is None and fewest is None:
        return
    if most is not None and fewest is not None and fewest > most:
        raise UserError(f"--min-pixels {fewest} is more than --max-pixels {most}.")
    images = processor.image_processor
    if getattr(images, "merge_size", None) and {"shortest_edge", "longest_edge"} <= set(dict(images.size or {})):
        limit_area(images, most, fewest)
        return
    if fewest is not None:
        raise UserError(f"--min-pixels has no meaning for {type(images).__name__}: leave it out.")
    assert most is not None
    if getattr(images, "crop_to_patches", None) is not None and getattr(images, "max_patches", None):
        limit_patches(images, most)
    elif getattr(images, "image_grid_pinpoints", None):
        limit_grid(images, most)
    elif getattr(images, "do_image_splitting", None) is not None and getattr(images, "max_image_size", None):
        limit_tiles(images, most)
    elif set(dict(images.size or {})) == {"longest_edge"}:
        limit_longest(images, most)
    else:
        raise UserError(
            f"--max-pixels has no meaning for this base: its {type(images).__name__} brings every image to one size. Leave it out."
        )


def limit_area(images: Any, most: int | None, fewest: int | None) -> None:
    """Of the Qwen kind: both sides are scaled to multiples of a patch within an area."""
    least = (images.patch_size * images.merge_size) ** 2
    if most is not None and most < least:
        raise UserError(f"--max-pixels {most} is less than one token of an image takes here: at least {least}.")
    size = dict(images.size)
    top = most if most is not None else size["longest_edge"]
    size = {"shortest_edge": min(fewest if fewest is not None else size["shortest_edge"], top), "longest_edge": top}
    images.size = type(images.size)(**size) if not isinstance(images.size, dict) else size
    for name, value in (("max_pixels", size["longest_edge"]), ("min_pixels", size["shortest_edge"])):
        if getattr(images, name, None) is not None:
            setattr(images, name, value)


def limit_patches(images: Any, most: int) -> None:
    """Of InternVL: an image is cut into at most so many squares."""
    side = dict(images.size)
    area = side["height"] * side["width"]
    if most < area:
        raise UserError(f"--max-pixels {most} is less than one of this base's tiles: at least {area}.")
    images.max_patches = min(images.max_patches, most // area)
    images.min_patches = min(images.min_patches, images.max_patches)


def limit_grid(images: Any, most: int) -> None:
    """Of LLaVA-NeXT and OneVision: an image is scaled into one of several grids."""
    grids = [grid for grid in images.image_grid_pinpoints if grid[0] * grid[1] <= most]
    if not grids:
        least = min(height * width for height, width in images.image_grid_pinpoints)
        raise UserError(f"--max-pixels {most} is less than the smallest grid of this base: at least {least}.")
    images.image_grid_pinpoints = grids


def limit_longest(images: Any, most: int) -> None:
    """Of Pixtral: the longer side is scaled to a number of pixels."""
    patch = images.patch_size if isinstance(images.patch_size, int) else dict(images.patch_size)["height"]
    longest = min(dict(images.size)["longest_edge"], math.isqrt(most))
    if longest < 2 * patch:
        raise UserError(
            f"--max-pixels {most} is less than one token of an image takes here: at least {(2 * patch) ** 2}."
        )
    images.size = (
        type(images.size)(longest_edge=longest) if not isinstance(images.size, dict) else {"longest_edge": longest}
    )


def limit_tiles(images: Any, most: int) -> None:
    """Of Idefics 3 and SmolVLM: the longer side is scaled to a number of tiles."""
    tile = dict(images.max_image_size)["longest_edge"]
    tiles = math.isqrt(most) // tile
    if not tiles:
        raise UserError(f"--max-pixels {most} is less than one of this base's tiles: at least {tile * tile}.")
    longest = min(dict(images.size)["longest_edge"], tiles * tile)
    images.size = (
        type(images.size)(longest_edge=longest) if not isinstance(images.size, dict) else {"longest_edge": longest}
    )
