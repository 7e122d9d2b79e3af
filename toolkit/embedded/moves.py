"""Short films of a creature that goes somewhere, or becomes larger or smaller: what order tells and no single frame does.

Where it begins and ends is drawn so that the mean place and the mean size of all films are alike, whatever it does.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from . import world

WAYS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "large": (0, 0), "small": (0, 0)}
FRAMES = 4
DISTANCE = 20.0  # from the first frame to the last, image pixels
RADII = (8.0, 17.0)  # of a creature that changes its size, from one to the other
RADIUS = 12.0  # of one that does not
WANDER = 6.0  # how far the middle of the way is from the image's, at most


def draw_moves(creature: int, scene: str, way: str, rng: np.random.Generator) -> list[Image.Image]:
    """FRAMES 64 px RGB images; `rng` moves everything a little, the same in all frames. way: of WAYS."""
    side = world.SIZE * world.ZOOM
    ground = Image.new("RGB", (side, side))
    world.draw_scene(ImageDraw.Draw(ground), scene, rng)
    build, flip, tilt = world.make_creature(creature), bool(rng.random() < 0.5), rng.uniform(-8, 8)
    middle = world.SIZE / 2 + rng.uniform(-WANDER, WANDER, 2)
    frames = []
    for share in np.linspace(-0.5, 0.5, FRAMES):
        size = {"large": share + 0.5, "small": 0.5 - share}.get(way)
        radius = RADIUS if size is None else RADII[0] + size * (RADII[1] - RADII[0])
        centre = middle + share * DISTANCE * np.array(WAYS[way])
        frame = ground.copy()
        figure = world.draw_creature(build, radius * world.ZOOM, flip=flip, tilt=tilt)
        world.paste_centred(frame, figure, (float(centre[0]), float(centre[1])))
        frames.append(world.finalize(frame))
    return frames
