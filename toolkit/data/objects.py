"""Boxes and points of rows: the field `objects`, and the marks in texts that stand for them.

`objects` is {"ref": [names], "bbox": [[x1, y1, x2, y2] or [x, y], ...], "bbox_type": "real" or "norm1", "image_id": [...]}. Each mark
<ref-object> is the next name, each <bbox> the next box. A box's text is first its numbers in pixels of the image; what a base expects
is written over it when the base is known (toolkit/vlm/grounding.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError

MARK = re.compile(r"(<bbox>|<box>|<point>|<ref-object>)")
UNITS = {"real": "pixels", "pixels": "pixels", "norm1": "relative", "norm1000": "thousandths"}


@dataclass
class Objects:
    """What is left of a row's objects for its marks."""

    names: list[str]
    places: list[dict[str, Any]]
    """Each {"numbers": 2 or 4 of them, "unit": of UNITS, "image": number of the image}."""


def parse_objects(row: dict[str, Any], used: set[str]) -> Objects | None:
    """The objects of a row. used: gets the field's name.

    Raises:
        UserError: for anything that is not of the form above.
    """
    used.add("objects")
    given = row.get("objects")
    if not given:
        return None
    if (
        not isinstance(given, dict)
        or not isinstance(given.get("bbox", []), list)
        or not isinstance(given.get("ref", []), list)
    ):
        raise UserError(
            'the field \'objects\' must be {"ref": [names], "bbox": [[x1, y1, x2, y2], ...]}: write it so, or --columns ignore=objects.'
        )
    if other := set(given) - {"ref", "bbox", "bbox_type", "image_id"}:
        raise UserError(
            f"the field 'objects' has '{sorted(other)[0]}', which is not known: it takes ref, bbox, bbox_type and image_id."
        )
    unit = str(given.get("bbox_type", "real"))
    if unit not in UNITS:
        raise UserError(f"the bbox_type '{unit}' of 'objects' is none of {', '.join(UNITS)}.")
    boxes, images = given.get("bbox", []), given.get("image_id", [0] * len(given.get("bbox", [])))
    if not isinstance(images, list) or len(images) != len(boxes):
        raise UserError("'objects' must have an image_id for each bbox, or none at all.")
    places = []
    for box, image in zip(boxes, images, strict=True):
        numbers = isinstance(box, list) and len(box) in (2, 4) and all(isinstance(n, (int, float)) for n in box)
        if not numbers or not all(0 <= n < 1e6 for n in box) or not isinstance(image, int):
            raise UserError(f"the bbox {box!r} of 'objects' is neither [x1, y1, x2, y2] nor [x, y].")
        if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
            raise UserError(
                f"the bbox {box!r} of 'objects' ends before it begins: it must be [x1, y1, x2, y2], not x, y, width, height."
            )
        places.append({"numbers": tuple(box), "unit": UNITS[unit], "image": image})
    return Objects([str(name) for name in given.get("ref", [])], places)


def fill_object_marks(messages: list[dict[str, Any]], objects: Objects | None) -> list[dict[str, Any]]:
    """The messages with names and boxes for their marks; a box is a block of its own, {"type": "text", "text": ..., "box": place}.

    Raises:
        UserError: when there are more or fewer marks than objects.
    """
    if objects is None:
        return messages
    names, places = iter(objects.names), iter(objects.places)
    counts = {"ref": 0, "bbox": 0}
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            for piece in MARK.split(part["text"]) if part["type"] == "text" else [None]:
                if piece is None:
                    parts.append(part)
                elif piece == "<ref-object>":
                    counts["ref"] += 1
                    parts.append({"type": "text", "text": next(names, piece)})
                elif MARK.fullmatch(piece):
                    counts["bbox"] += 1
                    place = next(places, None)
                    parts.append({"type": "text", "text": piece} if place is None else box_block(place))
                elif piece:
                    parts.append({"type": "text", "text": piece})
        message["content"] = join_texts(parts)
    for name, known in (("ref", objects.names), ("bbox", objects.places)):
        mark = "<ref-object>" if name == "ref" else "<bbox>"
        if counts[name] != len(known) and not (name == "ref" and counts[name] == 0):
            raise UserError(
                f"the field 'objects' has {len(known)} of '{name}' for {counts[name]} marks {mark} in the texts."
            )
    return messages


def box_block(place: dict[str, Any]) -> dict[str, Any]:
    """A box as a block."""
    return {"type": "text", "text": f"[{', '.join(f'{n:g}' for n in place['numbers'])}]", "box": place}


def plain_parts(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message's parts as chat templates take them: where there are boxes, as text of the words beside them."""
    if not any("box" in part for part in parts):
        return parts
    return join_texts([{key: value for key, value in part.items() if key != "box"} for part in parts])


def join_texts(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts, with plain texts that follow one another as one."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        plain = part["type"] == "text" and "box" not in part
        if plain and joined and joined[-1]["type"] == "text" and "box" not in joined[-1]:
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined
