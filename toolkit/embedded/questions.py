"""Questions about the tiny world's images, with their answers: what the embedded vision-language model is trained on."""

from __future__ import annotations

import numpy as np

from . import world
from .groups import CORNERS, Group, group_caption
from .world import Thing

NUMBERS = ("zero", "one", "two", "three", "four")
DESCRIBE = "Describe the picture."
Question = tuple[str, str, str]  # kind, question, answer


def thing_questions(thing: Thing) -> list[Question]:
    """All that is asked about an image of one kind of thing, or of a creature."""
    asked = [
        ("caption", DESCRIBE, world.caption(thing)),
        ("scene", "What is the scene?", thing.scene),
        ("shape", "What shape is it?", thing.shape),
        ("count", "How many are there?", thing.count),
    ]
    if thing.count == "one":
        asked += [("size", "How large is it?", thing.size), ("place", "Where is it?", thing.place)]
    if thing.shape != world.CREATURE_SHAPE:
        asked += [
            ("colour", "What colour is it?", str(thing.colour)),
            ("pattern", "Which pattern does it have?", thing.pattern),
            ("face", "Which face does it have?", thing.face),
        ]
    return asked


def group_questions(group: Group, rng: np.random.Generator) -> list[Question]:
    """What is asked about an image of several things: each by its place, and how many of a kind there are."""
    asked = [
        ("group caption", DESCRIBE, group_caption(group)),
        ("scene", "What is the scene?", group.scene),
        ("count", "How many are there?", NUMBERS[len(group.things)]),
    ]
    for corner, (shape, colour) in group.things.items():
        asked.append(("colour", f"What colour is the thing at the {corner}?", colour))
        asked.append(("shape", f"What shape is the thing at the {corner}?", shape))
    shapes, colours = zip(*group.things.values(), strict=True)
    here, anywhere = str(rng.choice(colours)), str(rng.choice(list(world.COLOURS)))
    for colour in sorted({here, anywhere}):
        asked.append(("count", f"How many {colour} things are there?", NUMBERS[colours.count(colour)]))
    here, anywhere = str(rng.choice(shapes)), str(rng.choice(world.SHAPES))
    for shape in sorted({here, anywhere}):
        asked.append(("count", f"How many of shape {shape} are there?", NUMBERS[shapes.count(shape)]))
    return asked


def vocabulary_texts() -> list[str]:
    """Sentences that hold every word of the questions and answers."""
    rng = np.random.default_rng(0)
    texts = [text for _ in range(2000) for _, *both in thing_questions(world.random_thing(rng)) for text in both]
    texts += [text for _, *both in thing_questions(world.random_creature_thing(rng, 0)) for text in both]
    for number in range(1, len(CORNERS) + 1):
        for _ in range(200):
            things = {
                c: (str(rng.choice(world.SHAPES)), str(rng.choice(list(world.COLOURS)))) for c in list(CORNERS)[:number]
            }
            group = Group(things, str(rng.choice(list(world.SCENES))))
            texts += [text for _, *both in group_questions(group, rng) for text in both]
    return texts
