"""The tiny world is what it says: reproducible, described, and with things held out."""

import numpy as np
from PIL import Image, ImageDraw

from rankfold.toolkit.embedded import groups, world
from rankfold.toolkit.embedded.judge import ANSWERS, IGNORE, label_indices


def test_a_sample_is_a_function_of_seed_and_index():
    one, text, thing = world.draw_sample(3, 14)
    two, text_again, thing_again = world.draw_sample(3, 14)
    assert one.tobytes() == two.tobytes()
    assert (text, thing) == (text_again, thing_again)
    assert world.draw_sample(4, 14)[0].tobytes() != one.tobytes()
    assert one.size == (64, 64)


def test_training_never_draws_what_is_held_out():
    seen = [world.draw_sample(0, index)[2] for index in range(1200)]
    assert not any(world.is_held_out(thing) for thing in seen)
    pairs = {(t.shape, t.colour) for t in seen if t.colour}
    assert len(pairs) == len(world.SHAPES) * len(world.COLOURS)
    rng = np.random.default_rng(0)
    assert all(world.is_held_out(world.random_thing(rng, held=True)) for _ in range(100))


def test_training_never_draws_the_demo_creature():
    from rankfold.apps.cli.demo import DEMO_CREATURE

    creatures = {world.draw_sample(0, index)[2].creature for index in range(1000)} - {None}
    assert max(creatures) < world.TRAINING_CREATURES <= DEMO_CREATURE


def test_captions_name_everything():
    thing = world.Thing("star", "beach", "red", "striped", "smiling", "large", "left")
    assert world.caption(thing) == "a large red striped smiling star on the beach at the left"
    crowd = world.Thing("cross", "snow", "blue", size="small", count="three")
    assert world.caption(crowd) == "three blue crosses in the snow"
    creature = world.Thing(world.CREATURE_SHAPE, "night", creature=7)
    assert world.caption(creature, noun="sks creature") == "a large sks creature at night in the centre"


def test_every_scene_and_shape_looks_different():
    def look(thing):
        return np.asarray(world.draw(thing, np.random.default_rng(0)), dtype=float)

    scenes = [look(world.Thing("star", scene, "red")) for scene in world.SCENES]
    shapes = [look(world.Thing(shape, "beach", "red")) for shape in world.SHAPES]
    for looks in (scenes, shapes):
        for a in range(len(looks)):
            for b in range(a):
                assert np.abs(looks[a] - looks[b]).mean() > 1


def test_labels_leave_out_what_a_image_does_not_settle():
    names = list(ANSWERS)
    creature = dict(zip(names, label_indices(world.Thing(world.CREATURE_SHAPE, "sea", creature=1)), strict=True))
    assert creature["colour"] == IGNORE
    assert ANSWERS["scene"][creature["scene"]] == "sea"
    crowd = dict(zip(names, label_indices(world.Thing("star", "sea", "red", count="two")), strict=True))
    assert crowd["place"] == crowd["size"] == IGNORE


def test_boxes_hold_what_was_drawn():
    """Outside its boxes an image is the bare scene; each box touches what it holds on all sides (to the blur's two pixels)."""
    for seed in range(20):
        group = groups.random_group(np.random.default_rng(seed))
        image, boxes = groups.draw_group_with_boxes(group, np.random.default_rng(seed))
        bare = Image.new("RGB", (world.SIZE * world.ZOOM,) * 2)
        world.draw_scene(ImageDraw.Draw(bare), group.scene, np.random.default_rng(seed))
        changed = (np.asarray(image, int) != np.asarray(world.finalize(bare), int)).any(-1)
        assert list(boxes) == list(group.things)
        left = changed.copy()
        for box in boxes.values():
            x1, y1, x2, y2 = (round(number) for number in box)
            rows, columns = changed[y1:y2, x1:x2].any(1).nonzero()[0], changed[y1:y2, x1:x2].any(0).nonzero()[0]
            assert rows[0] <= 2
            assert columns[0] <= 2
            assert rows[-1] >= y2 - y1 - 3
            assert columns[-1] >= x2 - x1 - 3
            left[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3] = False
        assert not left.any()
