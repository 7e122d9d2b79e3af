"""Images that are edits of one another: the figure stays where and as it is, pixel upon pixel, and something else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from . import world
from .world import Thing

SAME = "the same"
EMPTY = "the same place without it"


def recolour_words(colour: str) -> str:
    """What asks for another colour of a reference's thing."""
    return f"{SAME} in {colour}"


def random_figure(rng: np.random.Generator, creature: int | None = None, *, held: bool = False) -> Thing:
    """A creature, or else one thing; from the held-out combinations or from the rest."""
    if creature is not None:
        return world.random_creature_thing(rng, creature)
    while True:
        thing = world.random_thing(rng, held=held)
        if thing.count == "one":
            return thing


def draw_apart(thing: Thing, scene_seed: int, figure_seed: int, *, empty: bool = False) -> Image.Image:
    """A thing as 64 px RGB image whose scene and figure have randomness of their own. empty: the scene alone."""
    canvas = Image.new("RGB", (world.SIZE * world.ZOOM, world.SIZE * world.ZOOM))
    world.draw_scene(ImageDraw.Draw(canvas), thing.scene, np.random.default_rng(scene_seed))
    if not empty:
        world.paste_figures(canvas, thing, np.random.default_rng(figure_seed))
    return world.finalize(canvas)


def recoloured(thing: Thing, rng: np.random.Generator) -> Thing:
    """A thing in another colour, of the combinations that training may draw."""
    while True:
        changed = replace(thing, colour=str(rng.choice([name for name in world.COLOURS if name != thing.colour])))
        if not world.is_held_out(changed):
            return changed
