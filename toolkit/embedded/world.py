"""The tiny world: 64 px images of things and creatures, drawn from a description.

A *thing* has a shape, colour, pattern, face, size, place, count and scene, and a caption that names them.
A *creature* has a body, ears, legs, a tail and markings that no caption describes: the caption only says
"a creature", where it stands and how large it is. Creatures are what subject-driven training has to learn.

Everything is a function of the description and a random generator; nothing is read from disk.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # side of a finished image, pixels
ZOOM = 4  # images are drawn this much larger, then reduced, which smooths the edges

Box = tuple[float, float, float, float]  # left, top, right, bottom, image pixels

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 150, 60),
    "blue": (40, 90, 220),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (35, 35, 35),
}
PATTERNS = ("plain", "striped", "spotted")
FACES = ("none", "smiling", "sleepy")
SIZES = ("small", "large")
PLACES = {"left": (-14, 0), "right": (14, 0), "top": (0, -14), "bottom": (0, 14), "centre": (0, 0)}
COUNTS = ("one", "two", "three")
SCENES = {
    "beach": "on the beach",
    "meadow": "in a meadow",
    "snow": "in the snow",
    "desert": "in the desert",
    "night": "at night",
    "room": "in a room",
    "sea": "under the sea",
    "city": "in the city",
}
PREFIXES = ("", "", "a picture of ", "a photo of ")
CREATURE_SHAPE = "creature"


@dataclass(frozen=True)
class Thing:
    """What an image shows, in words. `shape` may be CREATURE_SHAPE; then `creature` says which one."""

    shape: str
    scene: str
    colour: str | None = None
    pattern: str = "plain"
    face: str = "none"
    size: str = "large"
    place: str = "centre"
    count: str = "one"
    creature: int | None = None


@dataclass(frozen=True)
class Creature:
    """The build of one creature. Colours are RGB 0..255, lengths are fractions of the body radius."""

    body: str
    colour: tuple[int, int, int]
    second: tuple[int, int, int]
    third: tuple[int, int, int]
    markings: str
    ears: str
    legs: int
    tail: str
    eyes: int
    belly: bool
    slim: float


def is_held_out(thing: Thing) -> bool:
    """True for the eighth of all (shape, colour, scene) triples that training never draws.

    Every pair of the three still occurs, so a prompt from here asks for a new combination of known words.
    """
    if thing.colour is None or thing.shape == CREATURE_SHAPE:
        return False
    code = SHAPES.index(thing.shape) + 3 * list(COLOURS).index(thing.colour) + 5 * list(SCENES).index(thing.scene)
    return code % 8 == 0


def random_thing(rng: np.random.Generator, *, held: bool = False) -> Thing:
    """A random thing, from the held-out combinations or from the rest."""
    while True:
        count = COUNTS[rng.choice(3, p=(0.7, 0.15, 0.15))]
        single = count == "one"
        thing = Thing(
            shape=str(rng.choice(SHAPES)),
            scene=str(rng.choice(list(SCENES))),
            colour=str(rng.choice(list(COLOURS))),
            pattern=str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))),
            face=str(rng.choice(FACES, p=(0.5, 0.25, 0.25))),
            size=str(rng.choice(SIZES)) if single else "small",
            place=str(rng.choice(list(PLACES))) if single else "centre",
            count=count,
        )
        if is_held_out(thing) == held:
            return thing


def random_creature_thing(rng: np.random.Generator, creature: int) -> Thing:
    """One creature at a random place, size and scene."""
    return Thing(
        shape=CREATURE_SHAPE,
        scene=str(rng.choice(list(SCENES))),
        size=str(rng.choice(SIZES, p=(0.25, 0.75))),
        place=str(rng.choice(list(PLACES))),
        creature=creature,
    )


def caption(thing: Thing, rng: np.random.Generator | None = None, *, noun: str | None = None) -> str:
    """The caption of a thing. With `rng` the wording varies and now and then leaves a word out."""
    keep = (lambda: rng.random() > 0.08) if rng is not None else (lambda: True)
    prefix = PREFIXES[rng.integers(len(PREFIXES))] if rng is not None else ""
    words = []
    if thing.count == "one" and keep():
        words.append(thing.size)
    if thing.colour is not None:
        words.append(thing.colour)
    if thing.pattern != "plain" and keep():
        words.append(thing.pattern)
    if thing.face != "none" and keep():
        words.append(thing.face)
    words.append((noun or thing.shape) + ("s" if thing.count != "one" else ""))
    if thing.shape == "cross" and thing.count != "one" and noun is None:
        words[-1] = "crosses"
    start = {"one": "a", "two": "two", "three": "three"}[thing.count]
    where = f" {SCENES[thing.scene]}"
    if thing.count == "one" and keep():
        where += " in the centre" if thing.place == "centre" else f" at the {thing.place}"
    return f"{prefix}{start} {' '.join(words)}{where}"


def draw(thing: Thing, rng: np.random.Generator, creature: Creature | None = None) -> Image.Image:
    """Draws a thing as a 64 px RGB image; `rng` moves it a little, as no two photos are the same."""
    return draw_with_boxes(thing, rng, creature)[0]


def draw_with_boxes(
    thing: Thing, rng: np.random.Generator, creature: Creature | None = None
) -> tuple[Image.Image, list[Box]]:
    """The same, and the box of each figure in it."""
    image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM))
    draw_scene(ImageDraw.Draw(image), thing.scene, rng)
    boxes = paste_figures(image, thing, rng, creature)
    return finalize(image), boxes


def paste_figures(
    canvas: Image.Image, thing: Thing, rng: np.random.Generator, creature: Creature | None = None
) -> list[Box]:
    """Draws a thing's figures on a canvas with a scene; returns the box of each."""
    if thing.shape == CREATURE_SHAPE:
        build = creature if creature is not None else make_creature(thing.creature or 0)
        radius = {"small": 11.5, "large": 17.0}[thing.size] * rng.uniform(0.94, 1.06)
        figure = draw_creature(build, radius * ZOOM, flip=bool(rng.random() < 0.5), tilt=rng.uniform(-8, 8))
        return [paste_centred(canvas, figure, place_centre(thing.place, rng))]
    boxes = []
    for centre, radius in layout(thing, rng):
        figure = draw_figure(thing, radius * ZOOM, tilt=rng.uniform(-7, 7))
        boxes.append(paste_centred(canvas, figure, centre))
    return boxes


def draw_pair(left: int, right: int, scene: str, rng: np.random.Generator) -> Image.Image:
    """Two creatures side by side, as large as two things are drawn."""
    side = SIZE * ZOOM
    image = Image.new("RGB", (side, side))
    draw_scene(ImageDraw.Draw(image), scene, rng)
    places = layout(Thing(shape=CREATURE_SHAPE, scene=scene, count="two"), rng)
    for creature, (centre, radius) in zip((left, right), places, strict=True):
        build, flip = make_creature(creature), bool(rng.random() < 0.5)
        paste_centred(image, draw_creature(build, radius * ZOOM, flip=flip, tilt=rng.uniform(-8, 8)), centre)
    return finalize(image)


def finalize(canvas: Image.Image) -> Image.Image:
    """The canvas at its final size, a little soft, as a photo is: razor edges would be most of what there is to compress."""
    return canvas.reduce(ZOOM).filter(ImageFilter.GaussianBlur(0.7))


def place_centre(place: str, rng: np.random.Generator) -> tuple[float, float]:
    """Centre of a single figure in image pixels."""
    dx, dy = PLACES[place]
    return SIZE / 2 + dx + rng.uniform(-2, 2), SIZE / 2 + dy + rng.uniform(-2, 2)


def layout(thing: Thing, rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """(centre, radius) of every figure, in image pixels."""
    if thing.count == "one":
        radius = {"small": 10.5, "large": 17.0}[thing.size] * rng.uniform(0.94, 1.06)
        return [(place_centre(thing.place, rng), radius)]
    offsets, radius = {"two": ((-15, 15), 13.0), "three": ((-21, 0, 21), 10.0)}[thing.count]
    radius *= rng.uniform(0.95, 1.05)
    return [((SIZE / 2 + x + rng.uniform(-1, 1), SIZE / 2 + rng.uniform(-4, 4)), radius) for x in offsets]


def paste_centred(image: Image.Image, figure: Image.Image, centre: tuple[float, float]) -> Box:
    """Pastes an RGBA figure with its middle at `centre` (image pixels); returns the box of what is in the image of it."""
    x, y = round(centre[0] * ZOOM - figure.width / 2), round(centre[1] * ZOOM - figure.height / 2)
    image.paste(figure, (x, y), figure)
    left, top, right, bottom = figure.getchannel("A").getbbox() or (0, 0, 0, 0)
    return (
        max(0.0, (x + left) / ZOOM),
        max(0.0, (y + top) / ZOOM),
        min(float(SIZE), (x + right) / ZOOM),
        min(float(SIZE), (y + bottom) / ZOOM),
    )


# ---------------------------------------------------------------------------------------------- scenes


def vary_shade(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """The colour, a little lighter or darker."""
    shift = rng.uniform(-7, 7)
    return tuple(int(np.clip(c + shift, 0, 255)) for c in colour)  # type: ignore[return-value]


def draw_scene(pen: ImageDraw.ImageDraw, scene: str, rng: np.random.Generator) -> None:
    """Fills the canvas with a scene: a few flat bands and regular marks, cheap to compress and easy to tell apart."""
    side = SIZE * ZOOM
    horizon = int((0.45 + rng.uniform(-0.04, 0.04)) * side)

    def band(top: float, bottom: float, colour: tuple[int, int, int]) -> None:
        pen.rectangle((0, top, side, bottom), fill=vary_shade(colour, rng))

    if scene == "beach":
        band(0, horizon, (150, 215, 245))
        band(horizon, horizon + 0.16 * side, (30, 130, 190))
        band(horizon + 0.16 * side, side, (236, 208, 140))
    elif scene == "meadow":
        band(0, horizon, (165, 220, 250))
        band(horizon, side, (110, 190, 70))
        for x in range(8, 64, 16):
            pen.polygon([(x * ZOOM - 12, side), (x * ZOOM, side - 40), (x * ZOOM + 12, side)], fill=(80, 155, 50))
    elif scene == "snow":
        band(0, horizon, (175, 190, 210))
        band(horizon, side, (218, 230, 245))
        for x in (10, 54):
            pen.polygon(
                [(x * ZOOM - 28, horizon), (x * ZOOM, horizon - 64), (x * ZOOM + 28, horizon)], fill=(60, 105, 95)
            )
    elif scene == "desert":
        band(0, horizon, (250, 190, 130))
        band(horizon, side, (205, 130, 60))
        pen.ellipse((-0.3 * side, horizon - 24, 0.5 * side, horizon + 80), fill=(220, 150, 80))
    elif scene == "night":
        band(0, horizon + 0.2 * side, (25, 30, 80))
        band(horizon + 0.2 * side, side, (70, 90, 85))
        for x, y in ((8, 8), (24, 14), (42, 7), (56, 17)):
            pen.ellipse((x * ZOOM - 6, y * ZOOM - 6, x * ZOOM + 6, y * ZOOM + 6), fill=(170, 170, 180))
    elif scene == "room":
        band(0, side, (235, 195, 205))
        for x in range(0, 64, 16):
            pen.rectangle((x * ZOOM, 0, (x + 8) * ZOOM - 1, side), fill=(222, 172, 186))
        band(horizon + 0.22 * side, side, (140, 95, 60))
    elif scene == "sea":
        band(0, 0.34 * side, (60, 190, 200))
        band(0.34 * side, 0.68 * side, (30, 150, 175))
        band(0.68 * side, side, (15, 105, 140))
    elif scene == "city":
        band(0, side, (205, 205, 200))
        for x, top in ((0, 18), (13, 28), (26, 14), (39, 25), (52, 19)):
            pen.rectangle((x * ZOOM, top * ZOOM, (x + 11) * ZOOM, side), fill=(120, 125, 140))
        band(horizon + 0.35 * side, side, (80, 80, 85))
    else:
        raise ValueError(f"Unknown scene '{scene}'. Choose one of: {', '.join(SCENES)}.")


# ---------------------------------------------------------------------------------------------- things


def shape_mask(shape: str, radius: float) -> Image.Image:
    """The filled outline of a shape: an "L" image of side about 2.6 radius, white inside."""
    half = int(1.3 * radius)
    mask = Image.new("L", (2 * half, 2 * half), 0)
    pen = ImageDraw.Draw(mask)
    c, r = half, radius

    def ring_points(n: int, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * i / n for i in range(n)]
        return [
            (c + radii[i % len(radii)] * r * math.cos(a), c + radii[i % len(radii)] * r * math.sin(a))
            for i, a in enumerate(angles)
        ]

    if shape == "circle":
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif shape == "square":
        pen.rectangle((c - 0.88 * r, c - 0.88 * r, c + 0.88 * r, c + 0.88 * r), fill=255)
    elif shape == "triangle":
        pen.polygon(ring_points(3, (1.2,), -math.pi / 2), fill=255)
    elif shape == "star":
        pen.polygon(ring_points(10, (1.22, 0.52), -math.pi / 2), fill=255)
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 60)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        pen.polygon([(c + 0.068 * r * a, c - 0.068 * r * (b + 2)) for a, b in zip(x, y, strict=True)], fill=255)
    elif shape == "cross":
        pen.rectangle((c - 0.36 * r, c - 1.1 * r, c + 0.36 * r, c + 1.1 * r), fill=255)
        pen.rectangle((c - 1.1 * r, c - 0.36 * r, c + 1.1 * r, c + 0.36 * r), fill=255)
    elif shape == "moon":
        pen.ellipse((c - 1.1 * r, c - 1.1 * r, c + 1.1 * r, c + 1.1 * r), fill=255)
        pen.ellipse((c - 0.45 * r, c - 1.05 * r, c + 1.45 * r, c + 0.85 * r), fill=0)
    elif shape == "ring":
        pen.ellipse((c - 1.1 * r, c - 1.1 * r, c + 1.1 * r, c + 1.1 * r), fill=255)
        pen.ellipse((c - 0.5 * r, c - 0.5 * r, c + 0.5 * r, c + 0.5 * r), fill=0)
    else:
        raise ValueError(f"Unknown shape '{shape}'. Choose one of: {', '.join(SHAPES)}.")
    return mask


def draw_outlined(mask: Image.Image, fill: Image.Image, ink: tuple[int, int, int], width: float) -> Image.Image:
    """An RGBA figure: `fill` inside the mask, an outline of `width` canvas pixels around it."""
    grown = Image.new("L", mask.size, 0)
    for k in range(12):
        angle = 2 * math.pi * k / 12
        grown.paste(255, (round(width * math.cos(angle)), round(width * math.sin(angle))), mask)
    figure = Image.new("RGBA", mask.size, (*ink, 0))
    figure.paste((*ink, 255), (0, 0), grown)
    figure.paste(fill, (0, 0), mask)
    return figure


def draw_pattern(
    size: tuple[int, int], pattern: str, colour: tuple[int, int, int], second: tuple[int, int, int], step: float
):
    """An RGBA sheet in a plain, striped or spotted pattern; `step` is its period in canvas pixels."""
    sheet = Image.new("RGBA", size, (*colour, 255))
    pen = ImageDraw.Draw(sheet)
    if pattern == "striped":
        for k in range(int(size[1] / step) + 1):
            pen.rectangle((0, (k + 0.5) * step, size[0], (k + 1) * step), fill=(*second, 255))
    elif pattern == "spotted":
        spot = 0.3 * step
        for row in range(int(size[1] / step) + 2):
            for column in range(int(size[0] / step) + 2):
                x, y = (column + 0.5 * (row % 2)) * step, row * step
                pen.ellipse((x - spot, y - spot, x + spot, y + spot), fill=(*second, 255))
    return sheet


def second_colour(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour of stripes and spots on a base colour: paler on dark, darker on pale."""
    bright = sum(colour) / 3 > 200
    mix = 0.55
    other = 60 if bright else 255
    return tuple(int((1 - mix) * c + mix * other) for c in colour)  # type: ignore[return-value]


def ink_for(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Outline ink: a darker shade of the colour, grey on black. Strong outlines would cost the autoencoder most of its PSNR."""
    return (110, 110, 110) if sum(colour) < 180 else tuple(int(0.55 * c) for c in colour)  # type: ignore[return-value]


def draw_figure(thing: Thing, radius: float, tilt: float) -> Image.Image:
    """One thing on a transparent ground, `radius` in canvas pixels, turned by `tilt` degrees."""
    colour = COLOURS[thing.colour or "red"]
    mask = shape_mask(thing.shape, radius)
    step = 0.8 * radius
    fill = draw_pattern(mask.size, thing.pattern, colour, second_colour(colour), step)
    figure = draw_outlined(mask, fill, ink_for(colour), width=0.9 * ZOOM)
    if thing.face != "none":
        draw_face(figure, thing.face, radius)
    return figure.rotate(tilt, Image.Resampling.BILINEAR)


def draw_face(figure: Image.Image, face: str, radius: float) -> None:
    """Two eyes and a mouth on a pale disc in the middle of the figure."""
    pen = ImageDraw.Draw(figure)
    c, r = figure.width / 2, 0.6 * radius
    pen.ellipse((c - r, c - r, c + r, c + r), fill=(255, 235, 215, 255))
    dark = (30, 25, 30, 255)
    width = max(2, int(0.14 * radius))
    for x in (-0.42 * r, 0.42 * r):
        if face == "smiling":
            pen.ellipse((c + x - 0.24 * r, c - 0.56 * r, c + x + 0.24 * r, c - 0.08 * r), fill=dark)
        else:
            pen.line((c + x - 0.3 * r, c - 0.2 * r, c + x + 0.3 * r, c - 0.2 * r), fill=dark, width=width)
    if face == "smiling":
        pen.arc((c - 0.55 * r, c - 0.35 * r, c + 0.55 * r, c + 0.65 * r), 20, 160, fill=dark, width=width)
    else:
        pen.ellipse((c - 0.16 * r, c + 0.25 * r, c + 0.16 * r, c + 0.55 * r), fill=dark)


# ---------------------------------------------------------------------------------------------- creatures


def make_creature(seed: int) -> Creature:
    """The creature with this number; every number is another build."""
    rng = np.random.default_rng((7919, seed))
    hue = rng.random()

    def tone(shift: float, saturation: float, value: float) -> tuple[int, int, int]:
        rgb = colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)
        return tuple(int(255 * c) for c in rgb)  # type: ignore[return-value]

    return Creature(
        body=str(rng.choice(("round", "tall", "wide", "boxy", "pear"))),
        colour=tone(0.0, rng.uniform(0.35, 0.95), rng.uniform(0.5, 0.98)),
        second=tone(rng.uniform(0.25, 0.75), rng.uniform(0.4, 0.95), rng.uniform(0.45, 0.98)),
        third=tone(rng.uniform(0.1, 0.9), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.98)),
        markings=str(rng.choice(("none", "stripes", "spots", "half", "band"))),
        ears=str(rng.choice(("none", "pointed", "round", "long", "horns", "antennae"))),
        legs=int(rng.choice((0, 2, 3, 4))),
        tail=str(rng.choice(("none", "ball", "spike", "fan"))),
        eyes=int(rng.choice((1, 2, 3))),
        belly=bool(rng.random() < 0.5),
        slim=float(rng.uniform(0.85, 1.1)),
    )


CREATURE_INK = (70, 60, 75)
BODIES = {"round": (1.0, 1.0), "tall": (0.78, 1.08), "wide": (1.15, 0.75), "boxy": (0.9, 0.9), "pear": (1.0, 1.0)}


def draw_creature(build: Creature, radius: float, *, flip: bool, tilt: float) -> Image.Image:
    """One creature on a transparent ground, `radius` in canvas pixels."""
    half = int(2.0 * radius)
    r = 0.82 * radius
    wide, high = BODIES[build.body]
    wide, high = wide * r * build.slim, high * r
    ink, line = CREATURE_INK, max(2, round(0.07 * radius))
    limbs = Image.new("RGBA", (2 * half, 2 * half), (*ink, 0))
    pen = ImageDraw.Draw(limbs)
    draw_tail(pen, build, half, wide, r, ink, line)
    draw_legs(pen, build, half, wide, high, r, ink, line)
    draw_ears(pen, build, half, wide, high, r, ink, line)

    mask = Image.new("L", limbs.size, 0)
    body = ImageDraw.Draw(mask)
    if build.body == "boxy":
        body.rounded_rectangle((half - wide, half - high, half + wide, half + high), radius=0.35 * r, fill=255)
    elif build.body == "pear":
        body.ellipse((half - 0.68 * wide, half - high, half + 0.68 * wide, half + 0.3 * high), fill=255)
        body.ellipse((half - wide, half - 0.35 * high, half + wide, half + high), fill=255)
    else:
        body.ellipse((half - wide, half - high, half + wide, half + high), fill=255)
    trunk = draw_outlined(mask, body_sheet(build, limbs.size, half, wide, high, r), ink, width=line)
    limbs.alpha_composite(trunk)
    draw_eyes(ImageDraw.Draw(limbs), build, half, wide, high, r)
    if flip:
        limbs = limbs.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return limbs.rotate(tilt, Image.Resampling.BILINEAR)


def body_sheet(build: Creature, size: tuple[int, int], half: int, wide: float, high: float, r: float) -> Image.Image:
    """The markings of the body, before it is cut out."""
    kind = {"stripes": "striped", "spots": "spotted"}.get(build.markings, "plain")
    sheet = draw_pattern(size, kind, build.colour, build.second, 0.55 * r)
    pen = ImageDraw.Draw(sheet)
    if build.markings == "half":
        pen.rectangle((half, 0, size[0], size[1]), fill=(*build.second, 255))
    elif build.markings == "band":
        pen.rectangle((0, half + 0.1 * r, size[0], half + 0.5 * r), fill=(*build.second, 255))
    if build.belly:
        pen.ellipse(
            (half - 0.5 * wide, half + 0.1 * high, half + 0.5 * wide, half + 1.05 * high), fill=(*build.third, 255)
        )
    return sheet


def draw_tail(pen, build: Creature, half: int, wide: float, r: float, ink, line: int) -> None:
    x, y = half + 0.9 * wide, half + 0.35 * r
    if build.tail == "ball":
        pen.ellipse((x, y - 0.35 * r, x + 0.7 * r, y + 0.35 * r), fill=build.third, outline=ink, width=line)
    elif build.tail == "spike":
        pen.polygon(
            [(x - 0.2 * r, y - 0.3 * r), (x + 0.95 * r, y - 0.75 * r), (x - 0.2 * r, y + 0.4 * r)],
            fill=build.third,
            outline=ink,
            width=line,
        )
    elif build.tail == "fan":
        pen.pieslice(
            (x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r), -60, 30, fill=build.third, outline=ink, width=line
        )


def draw_legs(pen, build: Creature, half: int, wide: float, high: float, r: float, ink, line: int) -> None:
    for k in range(build.legs):
        x = half + (2 * k / (build.legs - 1) - 1) * 0.65 * wide
        pen.rounded_rectangle(
            (x - 0.17 * r, half + 0.5 * high, x + 0.17 * r, half + high + 0.42 * r),
            radius=0.12 * r,
            fill=build.second,
            outline=ink,
            width=line,
        )


def draw_ears(pen, build: Creature, half: int, wide: float, high: float, r: float, ink, line: int) -> None:
    top = half - 0.8 * high
    for s in (-1, 1):
        x = half + s * 0.5 * wide
        if build.ears == "pointed":
            pen.polygon(
                [(x - 0.3 * r, top + 0.2 * r), (x + s * 0.25 * r, top - 0.65 * r), (x + 0.3 * r, top + 0.2 * r)],
                fill=build.second,
                outline=ink,
                width=line,
            )
        elif build.ears == "round":
            pen.ellipse(
                (x + s * 0.1 * r - 0.35 * r, top - 0.45 * r, x + s * 0.1 * r + 0.35 * r, top + 0.25 * r),
                fill=build.second,
                outline=ink,
                width=line,
            )
        elif build.ears == "long":
            pen.rounded_rectangle(
                (x - 0.17 * r, top - 0.95 * r, x + 0.17 * r, top + 0.2 * r),
                radius=0.17 * r,
                fill=build.second,
                outline=ink,
                width=line,
            )
        elif build.ears == "horns":
            pen.polygon(
                [(x - 0.12 * r, top + 0.2 * r), (x + s * 0.55 * r, top - 0.55 * r), (x + 0.2 * r, top + 0.2 * r)],
                fill=build.third,
                outline=ink,
                width=line,
            )
        elif build.ears == "antennae":
            pen.line((x * 0.5 + half * 0.5, top + 0.1 * r, x, top - 0.7 * r), fill=ink, width=2 * line)
            pen.ellipse(
                (x - 0.2 * r, top - 0.95 * r, x + 0.2 * r, top - 0.55 * r), fill=build.third, outline=ink, width=line
            )


def draw_eyes(pen, build: Creature, half: int, wide: float, high: float, r: float) -> None:
    size = {1: 0.34, 2: 0.24, 3: 0.19}[build.eyes] * r
    for k in range(build.eyes):
        x = half + (k - (build.eyes - 1) / 2) * 2.15 * size
        y = half - 0.3 * high
        pen.ellipse((x - size, y - size, x + size, y + size), fill=(255, 255, 255, 255))
        pen.ellipse((x - 0.5 * size, y - 0.5 * size, x + 0.6 * size, y + 0.6 * size), fill=(20, 20, 25, 255))


# ---------------------------------------------------------------------------------------------- samples


def draw_sample(seed: int, index: int, *, creatures: float = 0.3, held: bool = False) -> tuple[Image.Image, str, Thing]:
    """Image, caption and description number `index` of the endless training set with this seed.

    `creatures` is the share of images that show a creature; `held` draws from the held-out combinations.
    Creature numbers stay below TRAINING_CREATURES, so larger numbers are never trained on.
    """
    rng = np.random.default_rng((seed, index))
    alive = rng.random() < creatures
    thing = random_creature_thing(rng, int(rng.integers(TRAINING_CREATURES))) if alive else random_thing(rng, held=held)
    text = caption(thing, rng)
    return draw(thing, rng), text, thing


def random_captions(count: int, rng: np.random.Generator, *, creatures: float = 0.3) -> list[str]:
    """Captions as the training set has them, without its images. creatures: share of those that are of one."""
    texts = []
    for _ in range(count):
        number = int(rng.integers(TRAINING_CREATURES)) if rng.random() < creatures else None
        thing = random_thing(rng) if number is None else random_creature_thing(rng, number)
        texts.append(caption(thing, rng))
    return texts


TRAINING_CREATURES = 1_000_000  # creatures with a smaller number may be seen in training


def subject_images(creature: int, n: int, *, seed: int = 0) -> list[tuple[Image.Image, Thing]]:
    """`n` images of one creature in different scenes and places, large enough to see."""
    rng = np.random.default_rng((seed, creature))
    scenes = list(SCENES)
    order = [scenes[i] for i in rng.permutation(len(scenes))]
    images = []
    for k in range(n):
        thing = replace(random_creature_thing(rng, creature), scene=order[k % len(order)], size="large")
        images.append((draw(thing, rng), thing))
    return images
