"""References in the studio without a server: drawn from, recorded, given back, compared, and trained on."""

import shlex
from dataclasses import replace

import gradio as gr
import pytest
from PIL import Image
from tiny_families import SIDE

from rankfold.apps.cli import main
from rankfold.apps.studio.backend.comparison import ComparisonInputs, parse_comparison
from rankfold.apps.studio.backend.context import Studio
from rankfold.apps.studio.backend.paths import StudioPaths
from rankfold.apps.studio.pages import generate as generate_page
from rankfold.apps.studio.pages.generate import PARAMETERS, GeneratePage
from rankfold.apps.studio.widgets.reference_sets import ReferenceSets
from rankfold.pipelines.generate import parse_recipe, repeat
from rankfold.toolkit.core.errors import UserError
from rankfold.training.config.subject import SubjectConfig

NO_ADAPTERS = [value for _ in range(24) for value in (False, "", 1.0)]
FAR = 0.6


@pytest.fixture
def references(tmp_path):
    files = []
    for name in ("red", "blue", "green"):
        files.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (64, 64), name).save(files[-1])
    return files


@pytest.fixture
def places(folders, tmp_path):
    (tmp_path / "runs").mkdir()
    return StudioPaths(tmp_path / "runs", (folders("flux2-klein").parent,))


def pressed(base, *, start=None, given=None):
    """The boxes of the page: one image of one step."""
    return [
        str(base),
        "make it blue",
        "",
        5,
        1,
        1,
        1.0,
        SIDE,
        SIDE,
        "Model default",
        *NO_ADAPTERS,
        start,
        None,
        FAR,
        given,
    ]


def drawn(page, boxes):
    """What the page says last, and the images."""
    said, files, *_ = list(page.make_images(*boxes))[-1]
    return said, files


def test_images_are_made_from_references_and_made_again(folders, places, references, tmp_path, capsys):
    """As the gallery gives them, in their order; the image says so, gives them back, and the command that is shown repeats it."""
    page, base = GeneratePage(Studio(places, start_workers=False)), folders("flux2-klein")
    said, [file] = drawn(page, pressed(base, given=[(references[0], None), (references[1], None)]))
    recipe = parse_recipe(file)
    kept = list(recipe.references)
    assert [Image.open(path).getpixel((0, 0)) for path in kept] == [(255, 0, 0), (0, 0, 255)]
    other = drawn(page, pressed(base, given=references[1::-1]))[1][0]  # as programs give them, the other way round
    assert Image.open(other).tobytes() != Image.open(file).tobytes()
    assert Image.open(drawn(page, pressed(base))[1][0]).tobytes() != Image.open(file).tobytes()
    recalled = page.recall_settings(file)
    place = 1 + len(PARAMETERS) - 1  # behind what is said
    assert recalled[place] == kept
    again = drawn(page, [*pressed(base)[:-1], [(path, None) for path in recalled[place]]])[1][0]
    assert Image.open(again).tobytes() == Image.open(file).tobytes()
    command = shlex.split(said.split("to the byte: ")[1].removesuffix("</p>").split("<")[0])
    main([*command[1:], "--out", str(tmp_path / "again")])
    assert Image.open(tmp_path / "again" / "000005.png").tobytes() == Image.open(file).tobytes()


def test_references_that_cannot_be_used_are_refused_in_a_sentence(folders, places, references, tmp_path):
    page, klein = GeneratePage(Studio(places, start_workers=False)), folders("flux2-klein")
    (tmp_path / "page.png").write_text("no image")
    for boxes, words in (
        (pressed(folders("sd"), given=references[:1]), "1 reference image is given, and Stable Diffusion takes none"),
        (pressed(folders("flux-kontext"), given=references[:2]), "2 reference images are given, and FLUX.1 Kontext takes at most 1"),
        (pressed(klein, given=[str(tmp_path / "page.png")]), "Reference 1 cannot be used"),
        (pressed(klein, start=references[0], given=references[:1]), "--image does not work with --reference"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            drawn(page, boxes)
        if words.startswith("1"):  # of a base that is loaded already, too
            drawn(page, [*boxes[:-1], None])
            with pytest.raises(UserError, match=words):
                drawn(page, boxes)
    made = drawn(page, pressed(klein, given=references[:1]))[1][0]
    for kept in (places.generated_folder() / "_from").iterdir():
        kept.unlink()
    with pytest.raises(UserError, match="is not here"):
        page.recall_settings(made)


def test_programs_name_what_they_give(places):
    """/generate takes a start image and references, and whatever is not named is as the page begins."""
    with gr.Blocks() as demo:
        generate_page.build(Studio(places, start_workers=False))
    found = demo.get_api_info()["named_endpoints"]["/generate"]["parameters"]
    assert [one["parameter_name"] for one in found] == list(PARAMETERS)
    assert all(one["parameter_has_default"] for one in found)


def test_a_comparison_is_made_from_references(folders, places, references):
    boxes = ComparisonInputs(
        base=str(folders("flux2-klein")), prompt="make it blue", x="seed", x_values="0\n1", width=SIDE, steps=1,
        references=[(references[0], None)],
    )  # fmt: skip
    plan = parse_comparison(places, boxes)
    assert [len(recipe.references) for recipe in plan.recipes] == [1, 1]
    assert "1 reference image;" in f"{plan.heading};"
    image, own = repeat(replace(plan.recipes[0], guidance_scale=1.0))
    assert image.tobytes() != repeat(replace(own, references=(references[1],)))[0].tobytes()


def test_references_are_uploaded_as_sets_and_become_the_setting(places, references):
    with gr.Blocks():
        slot = ReferenceSets(places)
    box, _, free, said = slot.add_files(references[:2], "before", [])
    folder = str(places.runs / "_pictures" / "before")
    assert (box.value, free) == ([folder], "references-1")
    assert "Kept in the set before" in said
    assert slot.add_files(references, "more", box.value)[0].value == [folder, str(places.runs / "_pictures" / "more")]
    assert slot.external.to_value(box.value) == [folder]
    assert SubjectConfig().references == tuple(slot.external.to_value(None))
    with pytest.raises(UserError, match="a set named before already"):
        slot.add_files(references, "before", [])
    with pytest.raises(UserError, match="No file has been chosen"):
        slot.add_files(None, "other", [])
