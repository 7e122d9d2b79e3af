"""Boxes and points in the numbers that a base knows: written for training, read back from answers.

    pixels     of the image as the processor resizes it, [x1, y1, x2, y2] (Qwen2.5-VL)
    thousand   0 to 1000 of width and height (Qwen2-VL, Qwen3-VL, InternVL)
    eighths    0 to 8 of width and height: the lines between the embedded model's patches
    locations  <loc0000> to <loc1023>, y before x (PaliGemma)
    relative   0 to 1 with three decimals, of what the base sees (LLaVA and all others)

What the base sees is the image, the square that it is padded to, or the square that the processor cuts out of its middle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import UserError
from ..data.conversations import Conversation
from ..data.objects import plain_parts
from ..data.videos import ClipSize

Size = tuple[int, int]  # width, height
NUMBER = r"-?\d+(?:\.\d+)?"
NUMBERS = re.compile(rf"[\[(]\s*({NUMBER}(?:\s*,\s*{NUMBER})+)\s*[\])]")
LOCATION = re.compile(r"<loc(\d{4})>")
LOCATIONS = 1024
CONVENTIONS = ("pixels", "thousand", "eighths", "locations", "relative")


class Grounding:
    """How a base writes places in images."""

    def __init__(self, processor: Any, convention: str, pad_to_square: bool) -> None:
        """Raises UserError for a convention that is not known."""
        if convention not in CONVENTIONS:
            raise UserError(
                f"the base's config names the box_convention '{convention}', which is none of {', '.join(CONVENTIONS)}: correct its "
                "config.json."
            )
        self.processor, self.convention, self.pad_to_square = processor, convention, pad_to_square

    def visible(self, size: Size) -> tuple[float, float, float, float]:
        """Left, top, width and height of what the base sees, in pixels of an image of this size."""
        width, height = size
        if self.pad_to_square:
            side = max(size)
            return (width - side) / 2, (height - side) / 2, side, side
        images = self.processor.image_processor
        if getattr(images, "do_center_crop", False) and not getattr(images, "image_grid_pinpoints", None):
            side = min(size)
            return (width - side) / 2, (height - side) / 2, side, side
        return 0.0, 0.0, width, height

    def resized(self, size: Size) -> Size:
        """The size that the processor resizes an image of this size to; of Qwen's kind alone."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        images = self.processor.image_processor
        limits = dict(images.size)
        height, width = smart_resize(
            size[1],
            size[0],
            factor=images.patch_size * images.merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
        return width, height

    def scale(self, size: Size) -> Size:
        """What full width and height are in the base's numbers."""
        if self.convention == "pixels":
            return self.resized(size)
        full = {"thousand": 1000, "eighths": 8, "locations": LOCATIONS, "relative": 1}[self.convention]
        return full, full

    def write(self, place: dict[str, Any], size: Size) -> str:
        """The text of a place, see toolkit/data/objects.py, in an image of this size.

        Raises:
            UserError: for a place that is not in the image, or that the base does not see.
        """
        width, height = size
        unit = {"pixels": (1, 1), "relative": (width, height), "thousandths": (width / 1000, height / 1000)}[
            place["unit"]
        ]
        pixels = [number * unit[at % 2] for at, number in enumerate(place["numbers"])]
        if any(own > (width, height)[at % 2] + 0.5 for at, own in enumerate(pixels)):
            raise UserError(f"the box {list(place['numbers'])} is not in its image of {width} x {height} pixels.")
        left, top, wide, high = self.visible(size)
        shares = [
            min(1.0, max(0.0, (own - (left, top)[at % 2]) / (wide, high)[at % 2])) for at, own in enumerate(pixels)
        ]
        if len(shares) == 4 and (shares[0] == shares[2] or shares[1] == shares[3]) and pixels[0] != pixels[2]:
            raise UserError(
                f"the box {list(place['numbers'])} is in a part of the image that the base's processor cuts off: --pad-to-square keeps it."
            )
        full = self.scale(size)
        if self.convention == "locations":
            order = [at + 1 - 2 * (at % 2) for at in range(len(shares))]  # y before x
            return "".join(f"<loc{min(LOCATIONS - 1, int(shares[at] * LOCATIONS)):04d}>" for at in order)
        if self.convention == "relative":
            return f"[{', '.join(f'{share:.3f}' for share in shares)}]"
        return f"[{', '.join(str(round(share * full[at % 2])) for at, share in enumerate(shares))}]"

    def read(self, text: str, size: Size) -> tuple[float, ...] | None:
        """The first place in an answer, in pixels of the image; None when there is none."""
        if self.convention == "locations":
            found = [int(number) for number in LOCATION.findall(text)[:4]]
            numbers = [float(found[at + 1 - 2 * (at % 2)]) for at in range(len(found))] if len(found) in (2, 4) else []
        else:
            match = NUMBERS.search(text)
            numbers = [float(number) for number in match[1].split(",")] if match else []
        if len(numbers) not in (2, 4):
            return None
        left, top, wide, high = self.visible(size)
        full = self.scale(size)
        return tuple(
            (left, top)[at % 2] + number / full[at % 2] * (wide, high)[at % 2] for at, number in enumerate(numbers)
        )

    def fill(self, row: Conversation, media: Sequence[Size | ClipSize]) -> Conversation:
        """The row with its boxes in the base's numbers. media: sizes of its images and videos; boxes are of images.

        Raises:
            UserError: for a box of an image that is not there, and as `write` does.
        """
        if not any("box" in part for message in row.messages for part in message["content"]):
            return row
        sizes = [size for size in media if not isinstance(size, ClipSize)]
        messages = []
        for message in row.messages:
            parts = []
            for part in message["content"]:
                if "box" in part:
                    if part["box"]["image"] >= len(sizes):
                        raise UserError(
                            f"{row.location}: a box is of image {part['box']['image']}, and there are {len(sizes)}."
                        )
                    part = part | {"text": self.write(part["box"], sizes[part["box"]["image"]])}
                parts.append(part)
            messages.append(message | {"content": plain_parts(parts)})
        return replace(row, messages=tuple(messages))


def iou(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes; for points 1 where the second's pixel is the first's."""
    if len(one) != 4 or len(other) != 4:
        return float(len(one) == len(other) and all(abs(a - b) < 1 for a, b in zip(one, other, strict=True)))
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, wide) * max(0.0, high)
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0
