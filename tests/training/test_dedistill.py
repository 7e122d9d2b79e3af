"""Training adapters made of a distilled base's own images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankfold.apps.cli import main
from rankfold.toolkit.core.errors import UserError
from rankfold.training.config.defaults import drawing_defaults
from rankfold.training.launch.dedistill import dedistill
from rankfold.training.launch.start import preflight, resume


@pytest.fixture
def own(config, tmp_path):
    return replace(
        config, adapter="lora", images=None, out=tmp_path / "undo", steps=2, class_noun="image", preservation_weight=0.0,
        preview_steps=2, guidance_scale=1.0,
    )  # fmt: skip


def test_it_is_trained_on_what_the_base_draws_and_taken_at_once(config, own, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n")
    run = dedistill(own, prompts, 3)
    folder = tmp_path / "undo-images"
    texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert texts == ["a red circle", "a blue star", "a red circle"]
    images = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(images) == 3
    assert "No caption says" not in (run.folder / "log.txt").read_text()
    preflight(replace(config, training_adapter=run.folder))
    again = dedistill(replace(own, images=folder, out=tmp_path / "again"), prompts, 3)
    assert images == {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}  # what has been drawn alike stays
    with pytest.raises(UserError, match="would be other images"):
        dedistill(replace(own, images=folder, out=tmp_path / "other", preview_steps=3), prompts, 3)
    assert resume(again.folder).status()["state"] == "done"


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"preview_steps": None}, "a prompt", "--preview-steps is missing"),
        ({"guidance_scale": None}, "a prompt", "--guidance-scale is missing"),
        ({}, None, "--prompts is missing"),
        ({}, "\n", "is empty"),
        ({"adapter": "glora"}, "a prompt", "plain LoRA"),
    ],
)
def test_how_and_what_a_base_draws_is_asked_for(own, tmp_path, changes, given, words):
    prompts = tmp_path / "prompts.txt" if given else None
    if prompts:
        prompts.write_text(given)
    with pytest.raises(UserError, match=words):
        dedistill(replace(own, **changes), prompts, 2)
    assert not (tmp_path / "undo-images").exists()


def test_through_the_command(own, images, capsys):
    words = [
        "--base",
        own.base,
        "--out",
        str(own.out),
        "--images",
        str(images),
        "--preview-steps",
        "2",
        "--guidance-scale",
        "1",
    ]
    (own.out.parent / "prompts.txt").write_text("a red circle")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "dedistill", *words, "--prompts", str(own.out.parent / "prompts.txt")])
    assert "would be other images" in capsys.readouterr().err


def test_a_run_on_a_distilled_base_is_drawn_in_its_steps(config):
    distilled = replace(config, preview_steps=4, guidance_scale=1.0)
    assert drawing_defaults(config.base, distilled) == (4, 1.0)
    assert drawing_defaults(config.base, replace(distilled, guidance_scale=3.0)) == (25, 3.0)
    assert drawing_defaults("tiny-turbo") == (4, 1.0)
    assert drawing_defaults("tiny") == (25, 4.0)
