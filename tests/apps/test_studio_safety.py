"""What the studio refuses: paths and names that lead elsewhere, archives and images that are not what they say, strangers."""

import io
import json
import socket
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import gradio as gr
import pandas
import pytest
from PIL import Image, PngImagePlugin
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from rankfold.apps.cli.app import AppOptions, check_access, check_port
from rankfold.apps.studio.backend.context import Studio
from rankfold.apps.studio.backend.guard import Guard, client_address, login
from rankfold.apps.studio.backend.paths import StudioPaths
from rankfold.apps.studio.backend.presets import preset, with_base_preset
from rankfold.apps.studio.backend.run_paths import check_media, check_paths
from rankfold.apps.studio.pages.watch import OUTPUTS, WatchPage
from rankfold.apps.studio.render.curves import draw_curves, smooth, thin_out
from rankfold.apps.studio.render.messages import redact_secrets
from rankfold.apps.studio.render.run_view import MAX_AGE_SECONDS, MetricsFollower, Views
from rankfold.apps.studio.widgets import uploads
from rankfold.apps.studio.widgets.fields import (
    config_command,
    config_values,
    fields_of,
    from_input_value,
    parse_config,
    to_input_value,
    values_to_yaml,
)
from rankfold.apps.studio.widgets.form import Form
from rankfold.apps.studio.widgets.mask_painter import KEPT, MaskPainter, save_painted_mask
from rankfold.apps.studio.widgets.photos import PhotoStep
from rankfold.pipelines.generate import parse_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.config.checks import check_ranges
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import METHODS
from rankfold.training.launch import queue
from rankfold.training.runs.begin import SOURCES, with_absolute_paths


@pytest.fixture
def places(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "photos").mkdir()
    return StudioPaths(tmp_path / "runs", (tmp_path / "photos",))


def png(side=32):
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, "png")
    return buffer.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


# ---------------------------------------------------------------------------------------------- names and paths


@pytest.mark.parametrize(
    "name", ["..", "../other", "a/b", "/etc", "", ".hidden", "a\\b", "x" * 81, "a\0b", "a b", None, 3]
)
def test_names_that_lead_elsewhere(places, name):
    for ask in (places.run, places.new_run, places.upload_folder):
        with pytest.raises(UserError, match="is not a valid name of a"):
            ask(name)


def test_paths_outside_are_refused(places, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "secret")
    inside = places.readable_folder(str(tmp_path / "photos"), "The folder")
    assert inside == (tmp_path / "photos").resolve()
    for text in (
        str(tmp_path / "secret"),
        str(tmp_path / "photos" / ".." / "secret"),
        str(tmp_path / "photos" / "link"),
        "/etc",
    ):
        with pytest.raises(UserError, match="outside what the studio may read"):
            places.readable_folder(text, "The folder")
    with pytest.raises(UserError, match="does not exist"):
        places.readable_folder(str(tmp_path / "photos" / "nowhere"), "The folder")
    with pytest.raises(UserError, match="outside what the studio may read"):  # nobody learns here what exists elsewhere
        places.readable_folder(str(tmp_path / "nowhere"), "The folder")
    for text in ("a\0b", "~no such user/x"):
        with pytest.raises(UserError, match="is not a path that can be read"):
            places.readable_folder(text, "The folder")
    with pytest.raises(UserError, match="outside"):
        places.base("/etc")
    assert places.base("tiny") == "tiny"
    assert places.base("some/model") == "some/model"


PATHS_IN_TEXTS = {
    "also": {"sks2 cat": "/etc"}, "more_data": ("/etc/rows.jsonl=2",), "evaluate_clip": "local-dir:/etc",
    "masks": "/etc", "evaluate_prompts": "/etc", "base": "/etc", "references": (Path("/etc"),),
    "text_encoder": (Path("/etc"),), "layout": "/etc", "preview_base": "/etc",
}  # fmt: skip


@pytest.mark.parametrize("kind", [SubjectConfig, InstructConfig])
def test_every_path_of_a_config_is_checked(places, kind):
    hints = {name: str(hint) for name, hint in get_type_hints(kind).items() if name != "out"}
    paths = {name: Path("/etc") for name, hint in hints.items() if "Path" in hint}
    values = paths | {name: value for name, value in PATHS_IN_TEXTS.items() if name in hints}
    assert len(values) >= 7
    for key, value in values.items():
        with pytest.raises(UserError, match="outside what the studio may read"):
            check_paths(replace(kind(), **{key: value}), places, "run")


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_path_of_a_config_is_known_to_be_one(kind):
    """So that relative ones are right in a queue, and a run never deletes what it reads."""
    hints = get_type_hints(kind)
    assert {name for name, hint in hints.items() if "Path" in str(hint)} - {"out"} <= set(SOURCES)


def test_references_of_a_table_are_checked(places, tmp_path):
    """What a table beside the images names is read like any other path."""
    photos = tmp_path / "photos"
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    row = {"file_name": "a.png", "text": "x", "references": "/etc/passwd"}
    (photos / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="outside what the studio may read"):
        check_paths(SubjectConfig(images=photos), places, "run")


def test_relative_paths_within_texts_are_made_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.jsonl").write_text("{}")
    (tmp_path / "clip").mkdir()
    found = with_absolute_paths(InstructConfig(more_data=("more.jsonl=2", "more.jsonl", "nowhere=1")))
    assert found.more_data == (f"{tmp_path / 'more.jsonl'}=2", str(tmp_path / "more.jsonl"), "nowhere=1")
    found = with_absolute_paths(SubjectConfig(evaluate_clip="local-dir:clip"))
    assert found.evaluate_clip == f"local-dir:{tmp_path / 'clip'}"


def test_images_that_rows_name_are_checked(places, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    rows = tmp_path / "photos" / "rows.jsonl"

    def said(image):
        rows.write_text(json.dumps({"image": str(image), "question": "What?", "answer": "a dot"}))
        check_media(InstructConfig(data=rows), places)

    said(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match="outside what the studio may read"):
        said(tmp_path / "secret.png")


# ---------------------------------------------------------------------------------------------- strangers


def guarded(hosts=()):
    app = Starlette(
        routes=[
            Route("/", lambda request: PlainTextResponse("page"), methods=["GET", "POST"]),
            Route("/login", log_in, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
    )
    return TestClient(app, base_url="http://127.0.0.1:7860")


def log_in(request):
    answer = PlainTextResponse("in")
    answer.set_cookie("token", "x", httponly=True, samesite="none", secure=True)
    return answer


@pytest.mark.parametrize(
    "host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "192.168.1.5:7860", socket.gethostname()]
)
def test_the_studio_answers_to_its_own_names(host):
    assert guarded().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "", "[", "a b"]
)
def test_the_studio_answers_to_no_other_name(host):
    """A name that a stranger owns may be made to point at this machine (DNS rebinding)."""
    found = guarded().get("/", headers={"host": host})
    assert found.status_code == 403
    assert guarded(hosts=("Studio.example",)).get("/", headers={"host": "studio.example:443"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_sites_send_nothing(headers, status):
    assert guarded().post("/", headers=headers).status_code == status


def test_other_sites_read_nothing_but_may_link():
    cross = {"sec-fetch-site": "cross-site"}
    assert guarded().get("/", headers=cross | {"sec-fetch-mode": "cors"}).status_code == 403
    assert guarded().get("/", headers=cross | {"sec-fetch-mode": "navigate"}).status_code == 200


def test_answers_are_kept_on_this_site():
    found = guarded().post("/login")
    assert found.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "samesite=lax" in found.headers["set-cookie"].lower()
    assert "samesite=none" not in found.headers["set-cookie"].lower()


def test_wrong_passwords_make_their_own_address_wait():
    now = [1000.0]
    check = login("me", "long enough", clock=lambda: now[0])
    client_address.set("10.0.0.1")
    assert check("me", "long enough")
    assert not any(check("me", f"wrong {n}") for n in range(10))
    with pytest.raises(HTTPException, match="try again in 60 seconds"):
        check("me", "long enough")
    client_address.set("10.0.0.2")
    assert check("me", "long enough")
    client_address.set("10.0.0.1")
    now[0] += 61
    assert check("me", "long enough")


def test_the_run_folder_is_the_studios_own(places):
    config = check_paths(replace(SubjectConfig(), out=Path("/tmp/elsewhere")), places, "mine")
    assert config.out == places.runs / "mine"


def test_adapters_are_those_of_the_lists(places):
    for name in ("../x", "/etc", "nothing"):
        with pytest.raises(UserError, match="no adapter named"):
            places.adapter(name)
    with pytest.raises(UserError, match="neither in"):
        places.adapter_name("/etc")


# ---------------------------------------------------------------------------------------------- uploads


def test_images_and_captions_are_kept(tmp_path):
    archive = write_zip(
        tmp_path / "a.zip", {"one/a.png": png(), "one/a.txt": "a sks cat", "__MACOSX/a.png": b"x", ".b.png": b"x"}
    )
    folder = tmp_path / "kept"
    folder.mkdir()
    single = tmp_path / "b.png"
    single.write_bytes(png(48))
    assert uploads.store_uploads([archive, single], folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt", "b.png"]
    found = uploads.scan_folder(folder)
    assert [(one.path.name, one.width, one.caption) for one in found] == [("a.png", 32, "a sks cat"), ("b.png", 48, "")]


def test_folders_in_a_zip_are_used_or_named(tmp_path):
    """Names that several folders have stay apart with their captions; prompts of kohya's folders are captions."""
    archive = write_zip(
        tmp_path / "a.zip",
        {
            "one/a.png": png(), "one/a.txt": "first", "two/a.png": png(48), "10_sks dog/b.png": png(40), "10_sks dog/c.png": png(44),
            "10_sks dog/c.txt": "own", "three/alone.txt": "x", "one/metadata.jsonl": "", "two/metadata.jsonl": "",
        },
    )  # fmt: skip
    said = " ".join(uploads.store_uploads([archive], tmp_path / "kept"))
    found = {one.path.name: one.caption for one in uploads.scan_folder(tmp_path / "kept")}
    assert found == {"one-a.png": "first", "two-a.png": "", "b.png": "sks dog", "c.png": "own"}
    assert "the 10 repeats are not used" in said
    assert "one/metadata.jsonl is not used" in said
    assert "alone.txt is not kept" in said


def test_paintings_that_browsers_send_do_not_pile_up():
    with gr.Blocks():
        sent = MaskPainter(gr.Image()).editor.blob_storage
    for number in range(3 * KEPT):
        sent[str(number)] = number
    assert [*sent.values()] == [*range(2 * KEPT, 3 * KEPT)]


def test_a_painting_that_did_not_arrive_is_no_image_without_a_mask(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "image.png")
    image, file = str(tmp_path / "image.png"), tmp_path / "mask.png"
    with pytest.raises(UserError, match="did not arrive"):
        save_painted_mask({"background": None, "layers": [], "composite": None}, image, file)
    clear, stroke = Image.new("RGBA", (4, 3)), Image.new("RGBA", (4, 3))
    assert not save_painted_mask({"background": clear, "layers": [clear]}, image, file)
    stroke.putpixel((3, 2), (9, 9, 9, 40))
    assert save_painted_mask({"background": clear, "layers": [clear, stroke]}, image, file)
    assert Image.open(file).getbbox() == (6, 4, 8, 6)


def test_a_failed_upload_leaves_nothing(tmp_path, monkeypatch):
    """Neither an empty set nor half a one; what was there before stays."""
    folder, (first, second) = tmp_path / "kept", (tmp_path / "b.png", tmp_path / "c.png")
    for file in (first, second):
        file.write_bytes(png())
    write = uploads.write_atomic

    def full(path, data):
        if path.name == "c.png":
            raise UserError("No space left on device")
        write(path, data)

    monkeypatch.setattr(uploads, "write_atomic", full)
    with pytest.raises(UserError, match="No space"):
        uploads.store_uploads([first, second], folder)
    assert not folder.exists()
    uploads.store_uploads([first], folder)
    with pytest.raises(UserError, match="No space"):
        uploads.store_uploads([first, second], folder)
    assert [path.name for path in folder.iterdir()] == ["b.png"]
    assert "neither an image" in uploads.store_uploads([archive_of_nothing(tmp_path)], tmp_path / "none")[0]
    assert not (tmp_path / "none").exists()


def archive_of_nothing(folder):
    file = folder / "page.html"
    file.write_text("no image")
    return file


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "..\\a.png"])
def test_a_zip_that_leads_out_is_refused(tmp_path, name):
    archive = write_zip(tmp_path / "a.zip", {"good.png": png(), name: png()})
    folder = tmp_path / "kept"
    folder.mkdir()
    with pytest.raises(UserError, match="leads out of its folder"):
        uploads.store_uploads([archive], folder)
    assert not folder.exists()


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(uploads, "MAX_BYTES", 3 << 20)
    monkeypatch.setattr(uploads, "MAX_FILES", 5)
    folder = tmp_path / "kept"
    folder.mkdir()
    cases = {
        "more than 5": {f"{n}.png": png() for n in range(6)},
        "unpacks to more than": {"a.png": bytes(2 << 20)},
        "unpacks to more than 0 GiB": {f"{n}.png": bytes(1 << 20) for n in range(4)},
    }
    for words, files in cases.items():
        with pytest.raises(UserError, match=words):
            uploads.store_uploads([write_zip(tmp_path / "a.zip", files)], folder)
        assert not folder.exists()
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="is not a valid zip"):
        uploads.store_uploads([tmp_path / "b.zip"], folder)


def test_a_zip_that_lies_about_its_size(tmp_path, monkeypatch):
    """The header says 10 bytes; what comes out is counted."""
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1 << 16)
    archive = write_zip(tmp_path / "a.zip", {"a.png": bytes(1 << 20)})
    data = bytearray(archive.read_bytes())
    size = (1 << 20).to_bytes(4, "little")
    assert data.count(size) >= 2
    archive.write_bytes(bytes(data).replace(size, (10).to_bytes(4, "little")))
    (tmp_path / "kept").mkdir()
    try:
        refused = uploads.store_uploads([archive], tmp_path / "kept")
    except UserError:
        refused = ["refused"]
    assert refused
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a valid image"),
        ("a.png", b"<html><script>alert(1)</script></html>", "not a valid image"),
        ("a.svg", b"<svg/>", "neither an image"),
        ("a.html", b"<html/>", "neither an image"),
        ("a.png", png()[:100], "not a valid image"),
    ],
)
def test_what_is_no_image_is_refused_with_its_name(tmp_path, name, data, words):
    file = tmp_path / name
    file.write_bytes(data)
    (tmp_path / "kept").mkdir()
    (said,) = uploads.store_uploads([file], tmp_path / "kept")
    assert said.startswith(name)
    assert words in said
    assert not (tmp_path / "kept").exists()


def test_a_image_of_200_megapixels_is_refused(tmp_path):
    file = tmp_path / "a.png"
    Image.new("1", (14_200, 14_200)).save(file)
    (tmp_path / "kept").mkdir()
    (said,) = uploads.store_uploads([file], tmp_path / "kept")
    assert "202 megapixels" in said


def test_near_duplicates_are_noticed(tmp_path):
    image = Image.effect_noise((64, 64), 80).convert("RGB").resize((256, 256))
    image.save(tmp_path / "a.png")
    image.resize((200, 200)).save(tmp_path / "b.jpg", quality=60)
    Image.effect_noise((64, 64), 80).convert("RGB").resize((256, 256)).save(tmp_path / "c.png")
    assert [one.like for one in uploads.scan_folder(tmp_path)] == ["", "a.png", ""]


def test_captions_are_written_and_removed(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    uploads.write_captions(tmp_path, {"a.png": " a sks cat "})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a sks cat"
    uploads.write_captions(tmp_path, {"a.png": ""})
    assert not (tmp_path / "a.txt").exists()
    with pytest.raises(UserError, match="no image named"):
        uploads.write_captions(tmp_path, {"../b.png": "x"})


# ---------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_setting_has_a_meaning_and_survives_its_box(method):
    kind = METHODS[method]
    for field in fields_of(kind):
        assert field.help, field.name
        assert from_input_value(field, to_input_value(field, field.default)) == field.default, field.name
    blank = kind()
    assert parse_config(values_to_yaml(method, config_values(blank))) == blank


@pytest.mark.parametrize("base", ["tiny", "tiny-dit", "some/model"])
def test_presets_are_configs(base):
    config = parse_config(values_to_yaml("subject", preset("Standard", base) | {"base": base}))
    check_ranges(config)
    assert config.base == base


def test_the_command_means_the_same(capsys):
    """The command line reads back what the form shows."""
    from rankfold.apps.cli.train_subject import subject_options

    text = values_to_yaml(
        "subject",
        preset("Quick look", "tiny")
        | {
            "flip": True,
            "adapter_options": {"mixer": "frozen"},
            "also": {"sks2 cat": "photos"},
            "preview_prompts": ["a b", "c"],
        },
    )
    config = parse_config(text)
    words = config_command(config)
    assert words[:3] == ["rankfold", "train", "subject"]
    assert subject_options(words[3:], "train subject")[0] == config


def test_a_form_finds_settings_by_their_meaning():
    form = Form("subject", ("base",))
    found = [
        name for name, update in zip(form.rest, form.filter_fields("learning rate"), strict=False) if update["visible"]
    ]
    assert {"learning_rate", "lr_warmup_steps"} <= set(found)
    assert "masks" not in found
    assert all(update["visible"] for update in form.filter_fields(""))
    found = form.filter_fields("class noun")  # which its label does not say
    assert found[form.rest.index("class_noun")]["visible"]
    assert not found[form.rest.index("masks")]["visible"]


def form_state(**values):
    """A form, and what its boxes hold with these values."""
    form = Form("subject", ("base", "steps", "rank"), hidden=("out", "images"))
    with gr.Blocks():
        form.build_basic()
        form.build_rest()
        form.build_yaml()
    kept = {name: to_input_value(field, field.default) for name, field in form.fields.items()} | values
    return form, [form.option_rows("moslora", {}), *(kept[name] for name in form.widgets)]


def test_what_was_pasted_into_a_box_is_what_starts():
    """No event has told of it."""
    form, boxes = form_state(token="ohwx", steps=77)
    shown = form.written.value
    text, command, _, written = form.settle(shown, shown[1], *boxes)
    assert form.config(text).token == "ohwx"
    assert form.config(text).steps == 77
    assert "--token ohwx" in command
    assert written == (text, text)


def test_yaml_that_was_edited_is_what_starts():
    form, boxes = form_state()
    shown = form.written.value
    edited = shown[1] + "token: ohwx  # mine\n"
    text, _, _, written = form.settle(shown, edited, *boxes)
    assert text == edited
    assert form.config(text).token == "ohwx"
    _, pasted = form_state(token="zwx")
    with pytest.raises(UserError, match="both changed and say different things"):
        form.settle(shown, edited, *pasted)
    _, same = form_state(token="ohwx")
    assert form.config(form.settle(shown, edited, *same)[0]).token == "ohwx"
    assert form.config(form.settle(written, text, *pasted)[0]).token == "zwx"


@pytest.mark.parametrize(
    ("values", "words"), [({"rank": 0}, "rank"), ({"steps": -1}, "steps"), ({"also": "x"}, "JSON")]
)
def test_nothing_starts_while_a_box_is_wrong(values, words):
    form, boxes = form_state(**values)
    with pytest.raises(UserError, match=words):
        form.settle(form.written.value, form.written.value[1], *boxes)


def test_the_preset_follows_the_base_but_for_what_was_set():
    values = config_values(parse_config(values_to_yaml("subject", preset("Standard", "tiny"))))
    assert values["learning_rate"] is not None
    found = with_base_preset(values | {"rank": 5}, ("Standard", "tiny"), "some/model")
    assert found["learning_rate"] is None
    assert found["rank"] == 5
    blank = config_values(SubjectConfig())  # what the demo's preset alone sets is not left on another base
    assert [found[key] for key in ("train_text_encoder", "target_modules", "min_snr_gamma")] == [
        blank[key] for key in ("train_text_encoder", "target_modules", "min_snr_gamma")
    ]
    back = with_base_preset(found, ("Standard", "some/model"), "tiny")
    assert back["learning_rate"] == values["learning_rate"]


def test_captions_that_were_edited_are_saved_at_the_start(places, tmp_path):
    folder = tmp_path / "photos"
    for name in "ab":
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    (folder / "a.caption").write_text("a sks dot")
    with gr.Blocks():
        photos = PhotoStep(Studio(places, "0", False))
    table = pandas.DataFrame([["a.png", "a sks dot at night"], ["b.png", ""]], columns=["image", "caption"])
    assert "1 edited" in photos.save_edited(str(folder), table)
    assert (folder / "a.caption").read_text() == "a sks dot at night"
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.png", "a.caption"}
    assert photos.save_edited(str(folder), table) == ""


def test_fields_of_a_subject_are_labelled_in_words():
    labels = {field.name: field.label for field in fields_of(SubjectConfig)}
    assert labels["token"] == "Trigger word"
    assert labels["class_noun"].startswith("What it is")
    assert labels["learning_rate"] == "learning rate"


# ---------------------------------------------------------------------------------------------- watching


def test_a_run_is_shown_from_its_folder(places, monkeypatch):
    monkeypatch.setattr("rankfold.apps.studio.render.run_view.MAX_AGE_SECONDS", 60.0)
    run = Run(places.runs / "a")
    run.folder.mkdir()
    write_text(run.config_file, "method: subject\nbatch_size: 2\n")
    run.set_status(state="running", step=20, total=100)
    for step in (10, 20):
        run.append_metrics(step=step, loss=1 / step, samples_per_second=4.0, memory_gib=1.5)
    run.append_log("first")
    run.append_log("token hf_abcdefghijklmnop here")
    views = Views()
    view = views.view(run)
    assert "step 20 of 100" in view.status_html
    assert "about 40 s left" in view.status_html
    assert "1.50 GiB" in view.status_html
    assert 'role="img"' in view.curves_html
    assert view.previews == ()
    assert view.log.splitlines()[0].endswith("hf_... here")
    run.append_metrics(step=30, loss=0.01)
    assert views.view(run) is view
    run.set_status(state="failed", error="<b>out of memory</b>")
    failed = views.view(run)
    assert "&lt;b&gt;out of memory" in failed.status_html
    assert "at step 30" in failed.curves_html
    run.set_status(state="done", exports={"kohya": "export/a.safetensors"}, export_faults=["--export peft: <i>no"])
    done = views.view(run)
    assert "Exported: export/a.safetensors" in done.status_html
    assert "&lt;i&gt;no" in done.status_html


def test_a_view_follows_a_run_that_goes_on_and_one_that_was_cut_back(places):
    run = Run(places.runs / "a")
    run.folder.mkdir()
    run.set_status(state="running", step=2, total=9)
    rows = MetricsFollower(run.metrics_file)
    rows.follow()
    assert rows.steps == []
    run.append_metrics(step=1, loss=3.0)
    rows.follow()
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    rows.follow()
    assert rows.steps == [1]
    with run.metrics_file.open("a") as file:
        file.write('ss": 2.0}\n5\n{"loss": 1}\n{"step": 3, "likeness": 0.5, "prompt_fidelity": 0.2}\n')
    rows.follow()
    assert (rows.steps, rows.losses, rows.last["step"]) == ([1, 2], [3.0, 2.0], 2)
    assert [row["likeness"] for row in rows.measured] == [0.5]
    run.truncate_metrics(1)
    run.append_metrics(step=2, loss=7.0)
    rows.follow()
    assert (rows.steps, rows.losses, rows.measured) == ([1, 2], [3.0, 7.0], [])
    run.metrics_file.unlink()
    rows.follow()
    assert rows.steps == []


def test_a_look_sends_what_is_new_only(places):
    run = Run(places.runs / "a")
    run.folder.mkdir()
    write_text(run.config_file, "method: subject\n")
    run.set_status(state="running", step=1, total=9)
    watch = WatchPage(Studio(places))
    first = watch.show_run("a", ())
    assert "step 1 of 9" in first[0]
    assert first[5].interactive
    nothing = watch.show_run("a", first[4])
    assert nothing == (gr.skip(),) * OUTPUTS
    run.append_log("a line")
    time.sleep(1.1 * MAX_AGE_SECONDS)
    second = watch.show_run("a", first[4])
    assert second[3].endswith("a line")
    assert [value == gr.skip() for value in second] == [n not in (3, 4) for n in range(OUTPUTS)]


def test_views_are_let_go(places, monkeypatch):
    monkeypatch.setattr("rankfold.apps.studio.render.run_view.MAX_VIEWS", 2)
    views = Views()
    for name in "abcb":
        views.view(Run(places.runs / name))
    assert set(views.views) == set(views.followers) == {places.runs / "b", places.runs / "c"}


def test_rubbish_in_a_run_folder_is_passed_over(places):
    run = Run(places.runs / "a")
    (run.samples).mkdir(parents=True)
    run.config_file.write_text("{{{")
    run.status_file.write_bytes(b"\x00\xff")
    run.metrics_file.write_text('{"step": 1, "loss": 2.0, "samples_per_second": 1}\n{"step": 2, "lo')
    for name in ("x.png", "1a_b.png", "000001_00.json", "000001.txt"):
        (run.samples / name).write_text("rubbish")
    view = Views().view(run)
    assert "unknown" in view.status_html
    assert view.previews == ()
    assert queue.list_runs(places.runs)[0].folder == run.folder
    assert places.adapters() == {}


@pytest.mark.parametrize(
    ("method", "key", "words"),
    [
        ("subject", "samples_per_second", "4.0 images/s"),
        ("subject", "images_per_second", "4.0 images/s"),
        ("instruct", "images_per_second", "4.0 samples/s"),
    ],
)
def test_the_speed_of_older_runs_is_read(places, method, key, words):
    """Its name in metrics.jsonl has changed; what is counted depends on the method."""
    run = Run(places.runs / "a")
    run.folder.mkdir()
    write_text(run.config_file, f"method: {method}\nbatch_size: 2\n")
    run.set_status(state="running", step=20, total=100)
    for step in (10, 20):
        run.append_metrics(step=step, loss=1 / step, **{key: 4.0})
    view = Views().view(run)
    assert words in view.status_html
    assert "about 40 s left" in view.status_html


def test_curves():
    assert smooth([1.0, 1.0, 1.0]) == pytest.approx([1, 1, 1])
    assert smooth([0.0, 1.0], 0.5) == pytest.approx([0, 2 / 3])
    x, y = thin_out((list(range(2000)), list(range(2000))))
    assert len(x) <= 501
    assert (x[-1], y[-1]) == (1999, 1999)
    assert draw_curves("Loss", {"a": ([], [])}) == ""
    assert draw_curves("Loss", {"a": ([1.0], [float("nan")])}) == ""
    text = draw_curves("<Loss>", {"a": ([1.0, 2.0], [3.0, float("inf")])})
    assert "&lt;Loss&gt;" in text
    assert "inf" not in text.split("points")[1].split("/>")[0]


def test_secrets_are_blotted_out():
    assert redact_secrets("HF_TOKEN=hf_abcdefgh12345 rest") == "HF_TOKEN=hf_... rest"


# ---------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_need_a_password(host):
    with pytest.raises(UserError, match="asks for a login"):
        check_access(AppOptions(host=host), "")
    with pytest.raises(UserError, match="needs a password"):
        check_access(AppOptions(host=host, user="me"), "")
    with pytest.raises(UserError, match="shorter than 8"):
        check_access(AppOptions(host=host, user="me"), "short")
    check_access(AppOptions(host=host, user="me"), "long enough")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_this_machine_needs_none(host):
    check_access(AppOptions(host=host), "")


def test_a_port_that_is_taken_is_said_at_once():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="choose another --port"):
            check_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(UserError, match="choose another --port"):
        check_port("127.0.0.1", 99_999)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('{"prompt": "x", "adapters": ["/etc"], "strengths": [1.0], "hashes": ["y"]}', "neither in"),
        ('{"prompt": "x", "adapters": ["/etc"], "strengths": [1.0], "hashes": []}', "not equally many"),
        ('{"prompt": "x", "steps": "many"}', "cannot be read"),
        ("{}", "cannot be read"),
        ("[1]", "cannot be read"),
        ("rubbish", "cannot be read"),
    ],
)
def test_settings_in_a_png_are_not_trusted(places, tmp_path, said, words):
    """An image that somebody has prepared: nothing that it names is looked at before it is known to be ours."""
    info = PngImagePlugin.PngInfo()
    info.add_text("rankfold", said)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match=words):
        places.adapter_name(parse_recipe(tmp_path / "a.png").adapters[0])
