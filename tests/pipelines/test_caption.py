"""Captions by a vision-language model: the subject's words put in, what is there kept, on the command line and on the Train page."""

from __future__ import annotations

import pytest

from rankfold.apps.cli import main
from rankfold.apps.studio.backend.pipeline_worker import Job, JobStopped, ModelCache
from rankfold.apps.studio.widgets.photos import caption_rows
from rankfold.pipelines.caption import format_caption
from rankfold.toolkit.core.paths import assets_folder
from rankfold.toolkit.embedded import world
from rankfold.toolkit.vlm.model import EMBEDDED, available_bases
from rankfold.training.config.subject import SubjectConfig

CREATURE = 4_000_100


@pytest.fixture
def photos(tmp_path):
    """Six images of a creature; returns the folder and their scenes."""
    scenes = []
    for number, (image, thing) in enumerate(world.subject_images(CREATURE, 6)):
        image.save(tmp_path / f"{number}.png")
        scenes.append(thing.scene)
    return tmp_path, scenes


@pytest.mark.parametrize(
    ("said", "caption"),
    [
        ("A small dog sits on the grass.", "a small sks dog sits on the grass"),
        ("The image shows a Dog on a sofa. It is asleep.", "a sks Dog on a sofa"),
        ("Two dogs and a dog.", "two dogs and a sks dog"),
        ("A red armchair!", "a sks dog, a red armchair"),
        ("a sks dog in the sun", "a sks dog in the sun"),
        ("a dogged sks", "a dogged sks"),
        ("first line\nsecond line", "a sks dog, first line"),
    ],
)
def test_the_subjects_words_are_put_in(said, caption):
    assert format_caption(said, "sks", "dog") == caption


def test_captions_say_what_is_there(photos, capsys):
    folder, scenes = photos
    (folder / "0.txt").write_text("mine")
    main(["caption", str(folder), "--token", "qqz", "--class-noun", "creature"])
    assert (folder / "0.txt").read_text(encoding="utf-8") == "mine"
    written = [(folder / f"{number}.txt").read_text(encoding="utf-8") for number in range(1, 6)]
    assert all("qqz creature" in text for text in written)
    right = sum(world.SCENES[scene] in text for scene, text in zip(scenes[1:], written, strict=True))
    assert right >= 4, written
    capsys.readouterr()
    main(["caption", str(folder)])
    assert "All 6 images have captions" in capsys.readouterr().out
    main(["caption", str(folder), "--overwrite"])
    assert "sks" in (folder / "0.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--token", ""], "--token is empty"),
        (["--class-noun", " "], "--class-noun is empty"),
        (["--base", "somebody/model"], "--class-noun is missing"),
        (["--base", "tiny", "--class-noun", "dog"], "is neither a folder nor a hub id"),
    ],
)
def test_mistakes_are_one_sentence(photos, capsys, words, sentence):
    with pytest.raises(SystemExit):
        main(["caption", str(photos[0]), *words])
    assert sentence in capsys.readouterr().err
    assert not list(photos[0].glob("*.txt"))


def test_the_page_fills_what_is_missing(photos):
    folder, _ = photos
    rows = [["0.png", "mine"], ["1.png", ""], ["2.png", " "]]
    assert (
        caption_rows(rows, folder, "tiny-vlm", SubjectConfig(token="qqz", class_noun="creature"), ModelCache(), Job(2))
        == 2
    )
    assert rows[0] == ["0.png", "mine"]
    assert all("qqz creature" in text for _, text in rows[1:])
    assert not list(folder.glob("*.txt"))


def test_the_page_can_be_stopped(photos):
    rows, drawing = [["1.png", ""], ["2.png", ""]], Job(2)
    drawing.stopped = True
    with pytest.raises(JobStopped):
        caption_rows(
            rows, photos[0], "tiny-vlm", SubjectConfig(token="qqz", class_noun="creature"), ModelCache(), drawing
        )
    assert [bool(text) for _, text in rows] == [True, False]


def test_models_in_the_hubs_cache_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, files in (("models--we--see", ("config.json", "processor_config.json", "model.safetensors")),
                        ("models--no--weights", ("config.json", "processor_config.json"))):  # fmt: skip
        folder = tmp_path / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).symlink_to(assets_folder() / "tiny" / EMBEDDED["tiny-vlm"] / file)
    for name, text in (
        ("models--no--json", "{"),
        ("models--no--vision", '{"model_type": "bert"}'),
        ("models--a--list", "[]"),
    ):
        folder = tmp_path / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    assert available_bases() == ["tiny-vlm", "we/see"]
