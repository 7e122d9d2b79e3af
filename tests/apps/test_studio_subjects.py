"""Several adapters in one image of the studio: side by side, or where their places are painted."""

import json
import shlex
import shutil

import gradio as gr
import pytest
from PIL import Image, ImageDraw
from settings import quick_config

from rankfold.apps.cli import main
from rankfold.apps.studio.backend.context import Studio
from rankfold.apps.studio.backend.paths import StudioPaths
from rankfold.apps.studio.backend.several_subjects import COLOURS, PAINTED, SIDE_BY_SIDE, TOGETHER, painted_boxes
from rankfold.apps.studio.pages.generate import SETTINGS, GeneratePage, restored_boxes
from rankfold.apps.studio.widgets.adapter_rows import ROWS, AdapterRows
from rankfold.pipelines.generate import parse_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats.adapter_facts import FILE
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.start import train

WORDS = {"one": "sks", "two": "zwx", "three": ""}


@pytest.fixture(scope="module")
def places(base, images, tmp_path_factory):
    """Three adapters that are the same but for their words."""
    root = tmp_path_factory.mktemp("subjects")
    config = quick_config(
        SubjectConfig, base=str(base), images=images, steps=3, batch_size=2, rank=4, alpha=4.0, learning_rate=0.02, preview_every=0,
        threads=1, out=root / "made",
    )  # fmt: skip
    train(config)
    for name, token in WORDS.items():
        shutil.copytree(root / "made", root / "runs" / name)
        file = root / "runs" / name / "adapter" / FILE
        facts = json.loads(file.read_text()) | {"token": token, "class_noun": "creature" if token else ""}
        file.write_text(json.dumps(facts))
    return StudioPaths(root / "runs", (base, images))


@pytest.fixture
def page(places):
    return GeneratePage(Studio(places, start_workers=False))


def painting(*strokes, size=(100, 50)):
    """What the canvas gives: (colour, left, top, right, bottom) in pixels, right and bottom beyond."""
    layer = Image.new("RGBA", size)
    for colour, left, top, right, bottom in strokes:
        ImageDraw.Draw(layer).rectangle((left, top, right - 1, bottom - 1), fill=(*COLOURS[colour], 255))
    return {"background": Image.new("RGB", size), "layers": [layer], "composite": None}


LEFT, RIGHT = ("red", 0, 10, 40, 50), ("blue", 60, 0, 100, 45)


def boxes(base, *names, prompt="a {subjects} on the beach", n=1):
    """The page's boxes with these adapters."""
    rows = [value for name in names for value in (True, name, 1.0)]
    rows += [value for _ in range(24 - len(names)) for value in (False, "", 1.0)]
    return [str(base), prompt, "", 5, n, 2, 2.0, 0, 0, "Model default", *rows, None, None, 0.6, None]


def drawn(page, arrangement, places, values):
    """What the page says last, and the images."""
    said, files, *_ = list(page.make_painted_images(None, arrangement, places, *values))[-1]
    return said, files


def test_places_are_the_boxes_around_what_is_painted():
    found = painted_boxes(painting(LEFT, RIGHT))
    assert found == {"red": (0, 0.2, 0.4, 1), "blue": (0.6, 0, 1, 0.9)}
    faint = painting()
    faint["layers"][0].putpixel((3, 3), (*COLOURS["red"], 90))  # the soft edge of a stroke
    assert painted_boxes(faint) == {}


def test_images_are_made_with_a_figure_for_each_and_made_again(page, base, tmp_path):
    """Recorded, repeated by the command that is shown, and given back where the page has boxes for them."""
    made = {}
    for arrangement, painted in ((TOGETHER, None), (SIDE_BY_SIDE, None), (PAINTED, painting(LEFT, RIGHT))):
        said, [file] = drawn(page, arrangement, painted, boxes(base, "one", "two"))
        made[arrangement] = file
        command = shlex.split(said.split("to the byte: ")[1].split("<")[0])
        main([*command[1:], "--out", str(tmp_path / arrangement)])
        assert Image.open(tmp_path / arrangement / "000005.png").tobytes() == Image.open(file).tobytes()
    assert len({Image.open(file).tobytes() for file in made.values()}) == 3
    assert parse_recipe(made[SIDE_BY_SIDE]).subjects == ("sks creature", "zwx creature")
    assert parse_recipe(made[PAINTED]).regions == (
        ("a sks creature on the beach", 0, 0.2, 0.4, 1),
        ("a zwx creature on the beach", 0.6, 0, 1, 0.9),
    )
    assert page.recall_settings(made[SIDE_BY_SIDE])[-1] == SIDE_BY_SIDE
    assert "makes it again" not in page.recall_settings(made[SIDE_BY_SIDE])[0]
    said, *_, arrangement = page.recall_settings(made[PAINTED])
    assert arrangement == TOGETHER
    assert "makes it again" in said


@pytest.mark.parametrize(
    ("arrangement", "painted", "names", "prompt", "words"),
    [
        (SIDE_BY_SIDE, None, ["one"], "a {subjects}", "two adapters or more"),
        (SIDE_BY_SIDE, None, ["one", "three"], "a {subjects}", "Adapter 2 does not say its trigger words"),
        (SIDE_BY_SIDE, None, ["one", "one"], "a {subjects}", "cannot be told apart"),
        (SIDE_BY_SIDE, None, ["one", "two"], "a creature", "subjects"),
        (PAINTED, painting(LEFT), ["one", "two"], "a {subjects}", "Adapter 2 has no place: paint one in blue"),
        (PAINTED, painting(LEFT, RIGHT, ("green", 50, 0, 55, 9)), ["one", "two"], "a {subjects}", "no adapter for it"),
        (PAINTED, None, ["one", "two"], "a {subjects}", "did not arrive"),
        ("everywhere", None, ["one", "two"], "a {subjects}", "is not an arrangement"),
    ],
)
def test_what_cannot_be_arranged_is_a_sentence(page, base, arrangement, painted, names, prompt, words):
    with pytest.raises(UserError, match=words):
        drawn(page, arrangement, painted, boxes(base, *names, prompt=prompt))


def test_more_images_than_fit_beside_each_other(page, base):
    *_, (said, files, *_) = page.make_painted_images(None, SIDE_BY_SIDE, None, *boxes(base, "one", "two", n=5))
    assert "5 images" in said
    assert len(files) == 5


def test_rows_come_back_as_they_were(page, places):
    """After a reload: chosen, strong and on as before; one whose adapter is gone does not."""
    rows = [value for row in ((True, "one", 1.0), (False, "two", 0.5), (True, "deleted", 1.0)) for value in row]
    kept = ["tiny", "a", "", 1, 1, "", "", 0, 0, "Model default", *rows, *[True, None, 1.0] * (ROWS - 3)]
    with gr.Blocks():
        boxes = restored_boxes(page, AdapterRows(places), kept, None)[SETTINGS:]
    assert boxes[0:9:3] == (True, False, True)
    assert [box.value for box in boxes[1:9:3]] == ["one", "two", None]
    assert boxes[5].value == 0.5
