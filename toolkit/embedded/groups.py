"""Images of up to four different things, one in a corner each: what a vision-language model is asked about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from . import world

CORNERS = {"top left": (-15, -15), "top right": (15, -15), "bottom left": (-15, 15), "bottom right": (15, 15)}
RADIUS = 11.0  # of each thing, image pixels


@dataclass(frozen=True)
class Group:
    """Corner -> (shape, colour), in the order of CORNERS, before a scene."""

    things: dict[str, tuple[str, str]]
    scene: str


def random_group(rng: np.random.Generator) -> Group:
    """One to four things, all counts alike often."""
    corners = sorted(rng.permutation(len(CORNERS))[: rng.integers(1, len(CORNERS) + 1)].tolist())
    names, colours = list(CORNERS), list(world.COLOURS)
    things = {names[i]: (str(rng.choice(world.SHAPES)), str(rng.choice(colours))) for i in corners}
    return Group(things, str(rng.choice(list(world.SCENES))))


def draw_group(group: Group, rng: np.random.Generator) -> Image.Image:
    """Draws a group as a 64 px RGB image; `rng` moves everything a little."""
    return draw_group_with_boxes(group, rng)[0]


def draw_group_with_boxes(group: Group, rng: np.random.Generator) -> tuple[Image.Image, dict[str, world.Box]]:
    """The same, and the box of the thing in each corner."""
    boxes = {}
    side = world.SIZE * world.ZOOM
    image = Image.new("RGB", (side, side))
    world.draw_scene(ImageDraw.Draw(image), group.scene, rng)
    for corner, (shape, colour) in group.things.items():
        thing = world.Thing(shape=shape, scene=group.scene, colour=colour)
        radius = RADIUS * rng.uniform(0.94, 1.06) * world.ZOOM
        x, y = (world.SIZE / 2 + offset + rng.uniform(-1.5, 1.5) for offset in CORNERS[corner])
        boxes[corner] = world.paste_centred(image, world.draw_figure(thing, radius, tilt=rng.uniform(-7, 7)), (x, y))
    return world.finalize(image), boxes


def group_caption(group: Group) -> str:
    """'a red circle at the top left, a blue star at the bottom right, in the snow'."""
    parts = [
        f"{indefinite_article(colour)} {colour} {shape} at the {corner}"
        for corner, (shape, colour) in group.things.items()
    ]
    return ", ".join([*parts, world.SCENES[group.scene]])


def indefinite_article(word: str) -> str:
    """'a' or 'an'."""
    return "an" if word[0] in "aeiou" else "a"
