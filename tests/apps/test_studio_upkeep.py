"""What the studio keeps: sets of images, runs and adapters renamed and deleted; the run that a page shows; whose turn it is."""

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from rankfold.apps.cli.app import AppOptions, app
from rankfold.apps.studio.backend import housekeeping, temporary
from rankfold.apps.studio.backend.context import Studio
from rankfold.apps.studio.backend.guard import Guard
from rankfold.apps.studio.backend.numbers import LIMITS, parse_number
from rankfold.apps.studio.backend.paths import StudioPaths, to_slug
from rankfold.apps.studio.backend.turns import MAX_OF_PAGE, Client, Turns
from rankfold.apps.studio.pages.watch import WatchPage
from rankfold.apps.studio.render.messages import redact_secrets
from rankfold.apps.studio.render.previews import at_step, step_slider
from rankfold.apps.studio.render.run_view import Views
from rankfold.apps.studio.widgets import zoom_chart
from rankfold.apps.studio.widgets.fields import to_input_value
from rankfold.apps.studio.widgets.photos import PhotoStep
from rankfold.apps.studio.widgets.reference_sets import ReferenceSets
from rankfold.apps.studio.widgets.subject_run import SubjectPage, cloned_settings
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.embedded import world
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.launch.queue import queued_runs, run_next
from rankfold.training.runs import library


@pytest.fixture
def places(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))
    (tmp_path / "runs").mkdir()
    return StudioPaths(tmp_path / "runs", (tmp_path, tmp_path_factory.getbasetemp()))


def make_run(places, name, state, **settings):
    kind = settings.pop("kind", SubjectConfig)
    run = Run(places.runs / name)
    run.folder.mkdir()
    write_text(run.config_file, to_yaml(kind(out=run.folder, **settings)))
    run.set_status(state=state, step=3, total=3)
    return run


def make_set(places, name, count=2):
    folder = places.upload_folder(name)
    for number in range(count):
        Image.new("RGB", (64, 64), (number * 60, 90, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a sks dot {number}")
    return folder


# ---------------------------------------------------------------------------------------------- renamed and deleted


def test_a_run_that_is_needed_is_not_deleted(places):
    make_run(places, "part", "done")
    whole = make_run(places, "whole", "queued", kind=ComposeConfig, adapters=(str(places.runs / "part"),))
    with pytest.raises(UserError, match="whole, at work or in the queue"):
        housekeeping.delete_run(places, "part")
    with pytest.raises(UserError, match="waiting in the queue: stop it first"):
        housekeeping.delete_run(places, "whole")
    whole.set_status(state="stopped")
    assert "whole cannot go on without it" in housekeeping.deletion_of_run(places, "part")
    whole.set_status(state="done")
    assert "whole was made with it" in housekeeping.deletion_of_run(places, "part")
    (places.runs / "part" / "notes.md").write_text("mine")
    assert "notes.md, which no run has written" in housekeeping.deletion_of_run(places, "part")
    housekeeping.delete_run(places, "part")
    assert places.run_names() == ["whole"]
    assert not list(places.runs.glob(".deleted*"))
    with pytest.raises(UserError, match="no run named part: it was deleted or renamed"):
        places.run("part")


def test_a_run_is_renamed_wherever_it_is_named(places):
    make_run(places, "part", "done")
    make_run(places, "partly", "done")
    adapters = (str(places.runs / "part" / "adapter"), str(places.runs / "partly"))
    whole = make_run(places, "whole", "done", kind=ComposeConfig, adapters=adapters)
    before = places.run_names()
    housekeeping.rename_run(places, "part", "piece")
    assert from_yaml(whole.config_file).adapters == (
        str(places.runs / "piece" / "adapter"),
        str(places.runs / "partly"),
    )
    assert from_yaml(places.run("piece").config_file).out == places.runs / "piece"
    assert places.run_names() == ["piece" if name == "part" else name for name in before]
    with pytest.raises(UserError, match="There is a run named whole already"):
        housekeeping.rename_run(places, "piece", "whole")
    with pytest.raises(UserError, match="not a valid name"):
        housekeeping.rename_run(places, "piece", "../x")


def test_sets_of_images(places):
    folder = make_set(places, "cat")
    run = make_run(places, "on-cat", "queued", images=folder)
    for ask in (
        lambda: housekeeping.delete_set(places, "cat"),
        lambda: housekeeping.rename_set(places, "cat", "dog"),
        lambda: housekeeping.remove_image(places, folder, "0.png"),
    ):
        with pytest.raises(UserError, match="on-cat, at work or in the queue"):
            ask()
    run.set_status(state="stopped")
    assert housekeeping.remove_image(places, folder, "0.png") == "0.png was removed."
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "1.txt"]
    new = housekeeping.rename_set(places, "cat", "dog")
    assert from_yaml(run.config_file).images == new
    assert "on-cat cannot go on without it" in housekeeping.deletion_of_set(places, "dog")
    housekeeping.delete_set(places, "dog")
    assert housekeeping.image_sets(places) == []
    for name in ("dog", "../runs", ""):
        with pytest.raises(UserError, match="no set of images"):
            housekeeping.delete_set(places, name)


def test_images_of_other_folders_stay(places, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match="is a folder of yours"):
        housekeeping.remove_image(places, tmp_path / "photos", "a.png")
    assert (tmp_path / "photos" / "a.png").is_file()
    folder = make_set(places, "cat")
    with pytest.raises(UserError, match="There is no image named"):
        housekeeping.remove_image(places, folder, "../../photos/a.png")


def test_sets_do_not_run_into_each_other(places, tmp_path):
    with gr.Blocks():
        photos = PhotoStep(Studio(places))
    Image.new("RGB", (64, 64)).save(tmp_path / "new.png")
    make_set(places, "my-cat")
    with pytest.raises(UserError, match="There is a set named my-cat already"):
        photos.add_files([str(tmp_path / "new.png")], "my cat", "")
    outputs = photos.add_files([str(tmp_path / "new.png")], "my cat", str(places.upload_folder("my-cat")))
    assert len(outputs[1]) == 3
    outputs = photos.add_files([str(tmp_path / "new.png")], "mon élan", "")
    assert (outputs[-1], len(outputs[1])) == ("mon-elan", 1)


def test_the_library_renames_and_deletes(places, tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    file = tmp_path / "some.safetensors"
    save_file({"unet.x.lora_A.weight": zeros(2, 4), "unet.x.lora_B.weight": zeros(4, 2)}, file)
    library.add(file, name="one", base="tiny")
    run = make_run(places, "whole", "done", kind=ComposeConfig, adapters=(str(library.get("one").path),))
    housekeeping.rename_entry(places, "one", "two")
    assert from_yaml(run.config_file).adapters == (str(library.get("two").path),)
    assert library.get("two").base == "tiny"
    with pytest.raises(UserError, match="letters, digits"):
        library.rename("two", "../three")
    housekeeping.delete_entry(places, "two")
    assert library.entries() == []
    assert [path.name for path in library.library_folder().iterdir()] == [".lock"]


def test_a_waiting_run_goes_first(places):
    for number, name in enumerate("abc"):
        make_run(places, name, "queued").set_status(queued=100.0 + number)
    run_next(places.run("c"))
    assert [run.folder.name for run in queued_runs(places.runs)] == ["c", "a", "b"]
    make_run(places, "d", "done")
    with pytest.raises(UserError, match="does not wait"):
        run_next(places.run("d"))


@pytest.mark.parametrize(
    ("wish", "name"), [(" my dog ", "my-dog"), ("Käthe  1", "Kathe-1"), ("../x y", "../x-y"), (None, "")]
)
def test_names_as_people_write_them(wish, name):
    assert to_slug(wish) == name


def test_a_deleted_run_is_said_to_be_deleted(places):
    shown = WatchPage(Studio(places)).show_run("gone", ())
    assert "no run named gone: it was deleted or renamed" in shown[0]
    assert not shown[5].interactive


def test_previews_by_step():
    previews = tuple((f"{step}-{n}.png", f"step {step}") for step in (300, 200, 100) for n in range(2))
    assert [file for file, _ in at_step(previews, 190)] == ["200-0.png", "200-1.png"]
    slider, shown = step_slider(previews, 100)
    assert (slider.value, slider.minimum, slider.maximum, slider.step) == (100, 100, 300, 100)
    assert shown == at_step(previews, 100)
    assert step_slider(previews, 200)[0].value == 300  # who was at the newest goes on to the newest
    assert step_slider((), 0)[1] == []


# ---------------------------------------------------------------------------------------------- the run that a page shows


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings") / "my images"
    folder.mkdir()
    for number, (image, _) in enumerate(world.subject_images(2_000_010, 3)):
        image.save(folder / f"{number}.png")
    return folder


def settled(places, images, name, **values):
    """The YAML and the command that the Train page shows for these boxes."""
    with gr.Blocks():
        page = SubjectPage(Studio(places, start_workers=False))
        page.photos, page.references = PhotoStep(page.studio), ReferenceSets(places)
        page.build_settings()
        page.build_start()
        page.wire()
    form = page.form
    own = {key: to_input_value(field, field.default) for key, field in form.fields.items()} | values
    boxes = [form.option_rows("moslora", {}), *(own[key] for key in form.widgets)]
    other = {"images": str(images or ""), "out": name, "references": values.get("references", [])}
    boxes += [other[key] for key in form.external]
    text, command, *_ = form.settle(form.written.value, form.written.value[1], *boxes)
    return text, command, page, boxes


def digest(folder):
    """Of an adapter's files."""
    files = sorted(path for path in folder.rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


SHORT = {
    "steps": 2, "rank": 2, "batch_size": 2, "preview_every": 0, "checkpoint_every": 2, "log_every": 1, "threads": 1,
    "preservation_weight": 0.0,
}  # fmt: skip


def run_shell(command, folder):
    """As a user does who pastes it."""
    home = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{home}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, check=True, capture_output=True, timeout=400
    )


def test_command_and_yaml_are_the_run_to_the_bit(places, drawings, tmp_path, monkeypatch):
    """The command that is shown runs as it stands, the YAML starts by `rankfold queue`, and both give what Start gives."""
    from rankfold.training.launch.queue import run_queued

    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    text, command, page, _ = settled(places, drawings, "my first", **SHORT)
    assert shlex.split(command)[:3] == ["rankfold", "train", "subject"]
    run_shell(command, tmp_path)
    shown = digest(places.runs / "my-first" / "adapter")
    housekeeping.rename_run(places, "my-first", "by-command")
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    run_shell("rankfold queue settings.yaml", tmp_path)
    assert places.run("my-first").state() == "queued"
    run_queued(places.runs / "my-first")
    assert digest(places.runs / "my-first" / "adapter") == shown
    page.begin_run(str(drawings), text, "by page")
    run_queued(places.runs / "by-page")
    assert digest(places.runs / "by-page" / "adapter") == shown


def test_the_name_and_images_of_an_edited_yaml_are_taken(places, drawings):
    text, _, page, boxes = settled(places, drawings, "mine")
    form, written = page.form, (text, text)
    edited = text.replace("/mine", "/other") + "token: ohwx\n"
    found = form.config(form.settle(written, edited, *boxes)[0])
    assert (found.out, found.token, found.images) == (places.runs / "other", "ohwx", drawings)
    found = form.config(form.settle(written, "method: subject\ntoken: zwx\n", *boxes)[0])
    assert (found.out, found.token, found.images) == (places.runs / "mine", "zwx", drawings)


def test_a_draft_comes_back(places, drawings):
    text, _, page, _ = settled(places, drawings, "mine", token="ohwx")
    assert page.form.config(page.restored_settings(text)).token == "ohwx"
    for spoilt in (text.replace(str(drawings), "/etc"), "rubbish: [", "", None):
        assert page.restored_settings(spoilt) == ""
    make_run(places, "mine", "done")
    assert page.form.config(page.restored_settings(text)).out.name == "mine-2"


def test_references_of_the_page_are_the_commands_the_drafts_and_the_clones(places, drawings, tmp_path):
    """And a draft, or a clone, whose references are gone is not filled in."""
    before = make_set(places, "before", 3)
    drawings = shutil.copytree(drawings, places.upload_folder("after") / "own")
    for path in drawings.glob("*.png"):
        path.with_suffix(".txt").write_text("the same in the snow")
    text, command, page, boxes = settled(
        places, drawings, "mine", base="tiny-kontext", references=[str(before)], class_noun="thing"
    )
    words = shlex.split(command)
    assert words[words.index("--references") + 1] == str(before)
    assert page.form.config(page.restored_settings(text)).references == (before,)
    config = page.form.config(text)
    page.begin_run(str(drawings), text, "mine")
    assert page.paths.config("mine").references == (before,)
    assert page.form.config(cloned_settings(places, page.form, "mine")).references == config.references
    found = page.form.config(page.form.settle((text, text), "method: subject\ntoken: zwx\n", *boxes)[0])
    assert found.references == (before,)
    shutil.rmtree(before)
    assert page.restored_settings(text) == ""
    with pytest.raises(UserError, match=r"The references of mine in .* are no longer there"):
        cloned_settings(places, page.form, "mine")


def test_photos_and_an_embedded_base_are_warned_of(places, tmp_path):
    page = settled(places, None, "mine")[2]
    folder = make_set(places, "photos", 0)
    Image.effect_noise((640, 480), 90).convert("RGB").save(folder / "a.png")
    assert 'class="loud"' in page.warn(str(folder), "tiny")
    assert page.warn(str(folder), "some/model") == ""


# ---------------------------------------------------------------------------------------------- whose turn it is


def test_many_calls_of_one_do_not_stop_another():
    turns, order = Turns(), []
    one, other = Client("10.0.0.1", "a"), Client("10.0.0.1", "b")
    waiting = [turns.take(one) for _ in range(MAX_OF_PAGE)]
    own = [turn.__enter__() for turn in waiting]
    with pytest.raises(UserError, match="You have 4 requests waiting already"), turns.take(one):
        pass
    assert turns.ahead(own[0]) == 0
    with turns.take(other) as guest:
        assert turns.ahead(guest) == 1  # behind what is at work, before all that the first has waiting
        assert turns.ahead(own[1]) == 2
        waiting[0].__exit__(None, None, None)
        assert turns.ahead(own[1]) == 1
        assert turns.ahead(guest) == 0
    order = [turns.ahead(turn) for turn in own[1:]]
    assert order == [0, 1, 2]


def test_the_device_is_one_callers_at_a_time():
    turns, inside, most = Turns(), [], []

    def work(number):
        with turns.wait(Client("10.0.0.1", str(number))):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


@pytest.mark.parametrize("what", sorted(LIMITS))
def test_numbers_have_bounds(what):
    least, most, _ = LIMITS[what]
    assert parse_number(what, most) == most
    for wrong in (least - 1, most + 1, "nan", "1e999", None, "many"):
        with pytest.raises(UserError, match=f"does not fit as {what}"):
            parse_number(what, wrong)


@pytest.mark.parametrize(("name", "most"), [("rank", 4096), ("batch_size", 65_536)])
def test_settings_have_bounds(name, most):
    from rankfold.training.config.checks import check_ranges

    check_ranges(replace(SubjectConfig(), **{name: most}))
    with pytest.raises(UserError, match="at most"):
        check_ranges(replace(SubjectConfig(), **{name: most + 1}))


# ---------------------------------------------------------------------------------------------- files


def test_logs_and_settings_are_not_served(tmp_path):
    route = Route("/gradio_api/file={path:path}", lambda request: PlainTextResponse("served"))
    guarded = Starlette(routes=[route], middleware=[Middleware(Guard, temporary=tmp_path / "temporary")])
    client = TestClient(guarded, base_url="http://127.0.0.1:7860")

    def status(path):
        return client.get(f"/gradio_api/file={path}").status_code

    for path in ("log.txt", "output.txt", "config.yaml", "status.json", "log.txt?x=.png", "temporary/../log.txt"):
        assert status(tmp_path / "runs" / "a" / path) == 403, path
    assert status(tmp_path / "runs" / "a" / "samples" / "1.png") == 200
    assert status(tmp_path / "temporary" / "x" / "a.yaml") == 200


def test_secrets_are_blotted_out_wherever_they_come_from(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "quite unlike a token")
    said = (
        "quite unlike a token; Authorization: Bearer abcdefghijkl; https://me:pw@host/x; WANDB_API_KEY=0123; sk-"
        + "a" * 20
    )
    found = redact_secrets(said)
    for secret in ("unlike", "abcdefghijkl", ":pw@", "0123", "aaaa"):
        assert secret not in found
    assert redact_secrets("a sks dog, learning token: sks") == "a sks dog, learning token: sks"


def test_temporary_files_are_private_and_cleaned(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(temporary, "YOUNG", -1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    left = tmp_path / f"{temporary.PREFIX}left"
    left.mkdir()
    (left / "photo.png").write_text("x")
    first = temporary.make_temporary_folder()
    assert not left.exists()
    assert first.stat().st_mode & 0o077 == 0
    assert os.environ["GRADIO_TEMP_DIR"] == str(first)
    temporary.make_temporary_folder()
    assert first.is_dir()  # its studio lives
    monkeypatch.setattr("tempfile.tempdir", None)


def test_runs_on_a_file_are_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    with pytest.raises(UserError, match=r"--runs .*file is a file: give a folder"):
        app(["--runs", str(tmp_path / "file"), "--port", port])
    with pytest.raises(UserError, match="cannot be made"):
        app(["--runs", str(tmp_path / "file" / "runs"), "--port", port])
    assert AppOptions().runs == Path("runs")


def test_status_of_a_composition_says_what_it_is(places):
    from rankfold.apps.studio.render.run_view import Views

    adapters = (str(places.runs / "a"), str(places.runs / "b" / "adapter"))
    run = make_run(places, "whole", "done", kind=ComposeConfig, adapters=adapters, weights=(0.75, -0.5))
    status = Views().view(run).status_html
    assert "Composed of a (0.75), b (-0.5), fixed weights." in status
    assert 'href="/generate?adapter=whole"' in status
    assert json.dumps(status)


# ---------------------------------------------------------------------------------------------- charts


def test_charts_to_zoom_into_hold_what_was_measured(places):
    """The validation curve among them; what is no number is left out, and a region that is dragged over is what is shown."""
    run = make_run(places, "measured", "done")
    rows = [{"step": step, "loss": value} for step, value in ((1, 0.5), (2, float("nan")), (3, 0.25))]
    rows += [
        {
            "step": step,
            "likeness": 0.1,
            "prompt_fidelity": 0.2,
            "validation_loss": 0.4,
            "training_loss": 0.3,
            "likeness_real": 0.9,
        }
        for step in (0, 3)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts = Views().view(run).charts
    assert set(charts) <= set(zoom_chart.TITLES)
    loss = zoom_chart.chart_table(charts["Loss"])
    assert loss[loss.curve == "raw"][["step", "value"]].values.tolist() == [[1.0, 0.5], [3.0, 0.25]]
    noise = zoom_chart.chart_table(charts["Loss at fixed noise"])
    assert noise[noise.curve == "held out"][["step", "value"]].values.tolist() == [[0.0, 0.4], [3.0, 0.4]]
    assert set(noise.curve) == {"held out", "trained on"}
    assert {*loss.curve, *noise.curve} <= set(zoom_chart.COLOURS)
    assert zoom_chart.zoom(SimpleNamespace(index=[1, 2])).constructor_args["x_lim"] == [1, 2]
