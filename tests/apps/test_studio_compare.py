"""The Compare page without a server: what its boxes mean, in which order it draws, its sheet and its figures."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from rankfold.apps.studio.backend import comparison
from rankfold.apps.studio.backend.comparison import ComparisonInputs
from rankfold.apps.studio.backend.paths import StudioPaths
from rankfold.apps.studio.backend.pipeline_worker import Job, JobStopped, PipelineWorker
from rankfold.apps.studio.pages import compare as page
from rankfold.pipelines import compare
from rankfold.pipelines import grids as sheets
from rankfold.pipelines.compare import Axis, CellScores
from rankfold.pipelines.generate import Recipe, read_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.training.launch.start import train

KNOWN = {"cat": "/c", "cat at step 20": "/c20", "cat at step 100": "/c100", "library: dog": "/d"}


@pytest.fixture(autouse=True)
def empty_library(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A runs' folder with one short run on the embedded base, as at a step that was measured too."""
    from rankfold.training.config.subject import SubjectConfig

    folder = tmp_path_factory.mktemp("studio") / "runs"
    run = train(
        SubjectConfig(base="tiny", images=images, out=folder / "cat", steps=2, batch_size=1, rank=4, preview_every=0,
                      threads=1)
    )  # fmt: skip
    shutil.copytree(run.adapter, run.folder / "measured" / "000001")
    return folder


@pytest.fixture
def places(tmp_path):
    (tmp_path / "runs").mkdir()
    return StudioPaths(tmp_path / "runs")


def boxes(**values):
    return ComparisonInputs(**{"prompt": "a creature", "x": "seed", "x_values": "0\n1"} | values)


# ---------------------------------------------------------------------------------------------- axes


def test_a_third_axis_is_a_block_of_rows_for_each_value(places):
    plan = comparison.parse_comparison(places, boxes(y="guidance", y_values="1\n2", z="steps", z_values="2\n3"))
    assert len(plan.recipes) == 8
    assert plan.rows.labels == (
        "steps 2; guidance 1",
        "steps 2; guidance 2",
        "steps 3; guidance 1",
        "steps 3; guidance 2",
    )
    assert [(one.steps, one.guidance_scale, one.seed) for one in plan.recipes] == [
        (steps, guidance, seed) for steps in (2, 3) for guidance in (1.0, 2.0) for seed in (0, 1)
    ]
    assert "steps" not in plan.heading
    with pytest.raises(UserError, match="X varies the seed and Z the seed"):
        comparison.parse_comparison(places, boxes(z="seed", z_values="4"))
    with pytest.raises(UserError, match="2 x 40 are 80 cells"):
        comparison.parse_comparison(places, boxes(z="steps", z_values="\n".join(map(str, range(1, 41)))))


@pytest.mark.parametrize(
    ("what", "text", "values", "labels"),
    [
        ("strength", " 0 \n\n-0.5\n1e0", (0.0, -0.5, 1.0), ("strength 0", "strength -0.5", "strength 1e0")),
        ("seed", "7\n0", (7, 0), ("seed 7", "seed 0")),
        ("guidance", "2.5", (2.5,), ("guidance 2.5",)),
        ("steps", "10\n25", (10, 25), ("steps 10", "steps 25")),
        ("prompt", "a cat\na dog, red", ("a cat", "a dog, red"), ("a cat", "a dog, red")),
        ("adapter", "none\nlibrary: dog", ("", "library: dog"), ("no adapter", "library: dog")),
        ("checkpoint", "cat at step 100", ("cat at step 100",), ("cat at step 100",)),
        ("nothing", "left over", (None,), ("",)),
    ],
)
def test_an_axis_is_read(what, text, values, labels):
    assert comparison.parse_axis("X", what, text, KNOWN) == Axis(what, labels, values)


@pytest.mark.parametrize(
    ("what", "text", "said"),
    [
        ("strength", "0\nnan", "'nan' does not fit as strength"),
        ("strength", "0,5", "'0,5' does not fit"),
        ("strength", "inf", "'inf' does not fit"),
        ("seed", "1.5", "'1.5' does not fit as seed: give a whole number from 0 to 4294967295"),
        ("seed", "1_000", "'1_000' does not fit"),
        ("seed", "-1", "'-1' does not fit"),
        ("steps", "0", "from 1 to 1000"),
        ("guidance", "many", "'many' does not fit as guidance"),
        ("adapter", "../../etc/passwd", "'../../etc/passwd' is not a known adapter"),
        ("adapter", "library: dogs", "Did you mean 'library: dog'?"),
        ("checkpoint", "cat", "'cat' is not a known checkpoint"),
        ("seed", "1\n1.0", "'1.0' stands twice among the values of X"),
        ("prompt", " \n", "X has no values"),
        ("colour", "red", "X cannot vary 'colour'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(what, text, said):
    with pytest.raises(UserError) as error:
        comparison.parse_axis("X", what, text, KNOWN)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"x": "nothing"}, "Nothing varies along X"),
        ({"y": "seed", "y_values": "2"}, "which is the same setting"),
        ({"x_values": "\n".join(map(str, range(9))), "y": "steps", "y_values": "1\n2\n3\n4\n5\n6\n7\n8"}, "72 cells"),
        ({"x": "strength"}, "there is no adapter"),
        ({"adapter": "cat"}, "There is no adapter to compare yet"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"width": None}, "An empty box does not fit as width"),
        ({"seed": -2}, "'-2' does not fit as seed"),
        ({"base": "/etc"}, "lies outside what the studio may read"),
        ({"clip": "ViT-B-32"}, "does not say where the open_clip model's weights are"),
        ({"clip": "local-dir:/etc"}, "lies outside what the studio may read"),
        ({"clip": "hf-hub:../../etc"}, "does not say where"),
        ({"photos": "../runs"}, "is not a valid name of a run"),
    ],
)
def test_a_mistake_is_said_before_anything_is_drawn(places, values, said):
    with pytest.raises(UserError) as error:
        comparison.parse_comparison(places, boxes(**values))
    assert said in str(error.value)


def test_adapter_and_checkpoint_do_not_go_together():
    with pytest.raises(UserError, match="which is the same setting"):
        comparison.check_axes(Axis("adapter", ("a",), ("a",)), Axis("checkpoint", ("b",), ("b",)))


def test_every_cell_has_its_recipe_row_by_row(places):
    plan = comparison.parse_comparison(
        places, boxes(y="prompt", y_values="one\ntwo", prompt="", guidance=3, negative="fog", steps=9)
    )
    assert [(r.prompt, r.seed) for r in plan.recipes] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert {(r.guidance_scale, r.negative_prompt, r.steps, r.adapters) for r in plan.recipes} == {(3.0, "fog", 9, ())}
    assert plan.captions == ["seed 0, one", "seed 1, one", "seed 0, two", "seed 1, two"]
    assert plan.heading == "tiny; no adapter; without fog; 9 steps; guidance 3"
    assert plan.clip == "embedded"


def test_a_seed_by_chance_is_the_same_in_all_cells(places):
    plan = comparison.parse_comparison(places, boxes(seed=-1, x="guidance", x_values="1\n2"))
    assert plan.recipes[0].seed == plan.recipes[1].seed >= 0


def test_other_bases_are_not_measured_unless_a_model_is_named(places, base, trained):
    (places.runs / "model").symlink_to(base)
    wide = StudioPaths(trained, (base,))
    assert comparison.parse_comparison(wide, boxes(base=str(base))).clip == ""
    assert (
        comparison.parse_comparison(wide, boxes(base=str(base), clip=f"local-dir:{base}")).clip
        == f"local-dir:{base.resolve()}"
    )
    with pytest.raises(UserError, match="needs an open_clip model"):
        comparison.parse_comparison(wide, boxes(base=str(base), photos="cat"))
    with pytest.raises(UserError, match="lies outside"):  # a link leads nowhere else
        comparison.parse_comparison(places, boxes(base=str(places.runs / "model")))


def test_adapters_are_named_and_known(trained):
    places = StudioPaths(trained)
    plan = comparison.parse_comparison(
        places, boxes(x="adapter", x_values="none\ncat\ncat at step 1", y="strength", y_values="0.5\n1")
    )
    cat = places.adapters()
    assert [(r.adapters, r.strengths) for r in plan.recipes[:3]] == [
        ((), ()), ((str(cat["cat"]),), (0.5,)), ((str(cat["cat at step 1"]),), (0.5,)),
    ]  # fmt: skip
    assert plan.recipes[0] == plan.recipes[3]  # nothing to be strong
    assert plan.tokens == ("sks", "sks")
    assert comparison.runs_with_photos(places) == ["cat"]


def test_photos_that_are_gone_are_said(trained, tmp_path):
    run = tmp_path / "runs" / "gone"
    shutil.copytree(trained / "cat", run)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    images = comparison.run_photos(StudioPaths(trained), "cat")[0].parent
    (run / "config.yaml").write_text(text.replace(str(images), str(tmp_path / "elsewhere")))
    with pytest.raises(UserError, match="no longer there"):
        comparison.run_photos(StudioPaths(tmp_path / "runs"), "gone")


def test_values_are_proposed():
    assert page.propose_axis_values("adapter", "", "", KNOWN)[0].splitlines() == ["none", *KNOWN]
    assert page.propose_axis_values("checkpoint", "", "cat", KNOWN)[0].splitlines() == [
        "cat at step 20",
        "cat at step 100",
    ]
    assert page.propose_axis_values("prompt", "a cat", "", {})[0] == "a cat"
    for what in page.PROPOSED_VALUES:
        assert comparison.parse_axis("X", what, page.propose_axis_values(what, "", "", {})[0], {}).what == what


# ---------------------------------------------------------------------------------------------- order


def test_each_pipeline_is_loaded_once_and_each_image_drawn_once():
    def recipe(strength, seed):
        return Recipe(prompt="p", adapters=("/a",), strengths=(strength,), seed=seed)

    cells = [recipe(strength, seed) for seed in (0, 1) for strength in (0.5, 1.0)]
    order = compare.drawing_order([*cells, cells[0]])
    assert [(r.strengths[0], r.seed) for r in order] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]


# ---------------------------------------------------------------------------------------------- sheet


def solid_image(colour, size=(200, 100)):
    return Image.new("RGB", size, colour)


def test_the_sheet_has_its_cells_where_the_labels_say():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 0, 90), (0, 90, 90), (90, 90, 0)]
    made = sheets.draw_grid(
        [solid_image(one) for one in colours], ["seed 0", "seed 1", "seed 2"], ["guidance 1", "guidance 2"]
    )
    width, height = 400, 200  # twice as large, for at least 192 pixels
    left, top = made.width - 3 * width - 2 * sheets.GAP, made.height - 2 * height - sheets.GAP
    for number, colour in enumerate(colours):
        row, column = divmod(number, 3)
        x, y = left + column * (width + sheets.GAP), top + row * (height + sheets.GAP)
        assert made.getpixel((x, y)) == made.getpixel((x + width - 1, y + height - 1)) == colour
    for box in ((left, 0, left + width, top), (0, top, left, top + height)):  # a label is written in black on white
        assert made.crop(box).convert("L").getextrema() == (0, 255)
    assert made.crop((0, 0, left, top)).convert("L").getextrema() == (255, 255)


def test_a_single_row_has_no_margin_and_goes_on_below():
    made = sheets.draw_grid([solid_image("red", (64, 64))] * 11, [f"seed {n}" for n in range(11)], [""])
    assert made.width == 8 * 192 + 7 * sheets.GAP
    short = sheets.draw_grid([solid_image("red", (64, 64))] * 3, ["a", "b", "c"], [""])
    assert short.width == 3 * 192 + 2 * sheets.GAP
    assert made.height == 2 * short.height + sheets.GAP


def test_cells_are_enlarged_by_whole_numbers_and_a_sheet_has_an_end():
    assert sheets.cell_size((64, 64), 2, 2) == (192, 192)
    assert sheets.cell_size((1024, 512), 2, 2) == (1024, 512)
    width, height = sheets.cell_size((1024, 2048), 8, 8)
    assert (width, height) == (512, 1024)


def test_labels_are_broken_to_the_width():
    font = sheets.label_font(14)
    lines = sheets.wrap_text("a very long prompt about a creature " + "x" * 60, font, 120, 99)
    assert len(lines) > 4
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == "averylongpromptaboutacreature" + "x" * 60
    assert sheets.wrap_text("one two three four", font, 40, 2)[-1].endswith("…")
    assert sheets.wrap_text("", font, 40, 2) == []


def test_a_heading_stands_above():
    made = sheets.add_heading(solid_image("red", (300, 100)), "tiny; seed 3")
    assert made.crop((0, made.height - 100, 300, made.height)).getcolors() == [(30000, (255, 0, 0))]
    assert made.crop((0, 0, 270, made.height - 100)).convert("L").getextrema() == (0, 255)


# ---------------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    photos = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = compare.score_images(images, texts, photos)
    assert [one.fidelity for one in found] == pytest.approx([0.0, 0.6])
    assert [one.likeness for one in found] == pytest.approx([0.5, 0.7])
    assert [one.likeness for one in compare.score_images(images, texts)] == [None, None]


def test_rare_words_are_not_measured():
    assert compare.remove_tokens("a sks, creature and ohwx skskin", ("sks", "ohwx")) == "a , creature and skskin"
    assert compare.remove_tokens("sks", ("sks",)) == "sks"


def test_the_table_has_a_row_for_each_cell(places):
    plan = comparison.parse_comparison(places, boxes())
    result = compare.ComparisonResult("s.png", ["/m/a.png", "/m/b.png"], [CellScores(0.25, 0.5), CellScores(0.0)])
    assert page.score_table(plan, result)["data"] == [
        ["seed 0", "", "0.250", "0.500", "a.png"], ["seed 1", "", "0.000", "", "b.png"],
    ]  # fmt: skip
    assert page.score_table(plan, result)["headers"][:2] == ["X: seed", "Y: nothing"]
    assert page.score_table(plan, replace(result, scores=[]))["data"][0][2:4] == ["", ""]
    assert "cells in" in page.describe_result(plan, replace(result, real=0.8), 3)


# ---------------------------------------------------------------------------------------------- a real drawing


def test_a_small_comparison(trained):
    places, pipes, done = StudioPaths(trained), PipelineWorker(), {}
    wanted = boxes(
        prompt="a sks creature", steps=2, adapter="cat", x="strength", x_values="0\n1", y="seed", y_values="3\n4",
        photos="cat",
    )  # fmt: skip
    plan = comparison.parse_comparison(places, wanted)
    drawing = Job(8)
    result = compare.compare(plan, comparison.drawer(pipes, places.generated_folder(), done, drawing))
    assert drawing.progress == 1
    assert [(r.strengths, r.seed) for r in done] == [((0.0,), 3), ((0.0,), 4), ((1.0,), 3), ((1.0,), 4)]
    read = [read_recipe(trained / "_made" / file.split("/")[-1]) for file in result.files]
    assert [(r.strengths, r.seed, r.steps) for r in read] == [
        ((0.0,), 3, 2), ((1.0,), 3, 2), ((0.0,), 4, 2), ((1.0,), 4, 2),
    ]  # fmt: skip
    with Image.open(result.grid) as made:
        assert made.width > 2 * 192
    assert all(-1 <= one.fidelity <= 1 and -1 <= one.likeness <= 1 for one in result.scores)
    assert result.real > 0.5
    name = result.files[0].split("/")[-1]
    assert page.find_generated_image(places, name) == result.files[0]
    for wrong in ("../cat/config.yaml", result.files[0], "none.png"):
        with pytest.raises(UserError, match="There is no image named"):
            page.find_generated_image(places, wrong)


def test_a_comparison_from_python(tmp_path):
    plan = compare.comparison(Recipe(prompt="a creature", steps=2), Axis("seed", ("seed 1", "seed 2"), (1, 2)))
    result = compare.compare(plan, compare.draw_into(tmp_path))
    assert [read_recipe(file).seed for file in result.files] == [1, 2]
    with Image.open(result.grid) as made:
        assert made.width > 2 * 192
    both = compare.comparison(
        plan.recipes[0], Axis("guidance_scale", ("1", "2"), (1.0, 2.0)), Axis("seed", ("3", "4"), (3, 4))
    )
    assert [(one.guidance_scale, one.seed) for one in both.recipes] == [(1.0, 3), (2.0, 3), (1.0, 4), (2.0, 4)]
    with pytest.raises(UserError, match="guidance is no field of a recipe"):
        compare.comparison(plan.recipes[0], Axis("guidance", ("1",), (1.0,)))


def test_a_page_is_told_how_far_it_is(places):
    plan = replace(comparison.parse_comparison(places, boxes(steps=2)), clip="")
    shown = [values for _, values in page.stream_comparison(plan, PipelineWorker(), places.generated_folder())]
    assert "0 of 2 images" in shown[0][0]
    assert shown[0][1:4] == (None, [], [])
    assert "2 cells in" in shown[-1][0]
    assert [caption for _, caption in shown[-1][2]] == ["seed 0", "seed 1"]
    assert [len(values) for values in shown] == [7] * len(shown)


def test_a_stop_keeps_what_was_drawn(places):
    plan = replace(comparison.parse_comparison(places, boxes(steps=60, x_values="1\n2\n3")), clip="")
    for drawing, values in page.stream_comparison(plan, PipelineWorker(), places.generated_folder()):
        drawing.stopped = drawing.done > 70
        said = values[0]
    assert "Stopped; " in said
    assert f"{len(list(places.generated_folder().iterdir()))} of 3 images" in said


def test_it_stops_between_images(places):
    plan, drawing = comparison.parse_comparison(places, boxes(steps=2)), Job(4)
    drawing.stopped = True
    with pytest.raises(JobStopped):
        compare.compare(
            replace(plan, clip=""), comparison.drawer(PipelineWorker(), places.generated_folder(), {}, drawing)
        )
    assert not list(places.generated_folder().iterdir())
