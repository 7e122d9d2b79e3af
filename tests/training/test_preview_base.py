"""Trained on a base, previewed on its distilled sibling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_runs import a_config
from forked import run_in_two_processes
from PIL import Image
from short_runs import adapter, equal_states, train_until, write_config

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate, read_recipe
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.training.config.defaults import drawing_defaults
from rankfold.training.config.unused import unused_settings
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.evaluation.measuring import load_measurements
from rankfold.training.launch.plan import plan
from rankfold.training.launch.start import preflight, resume, train


@pytest.fixture
def short(images, tmp_path):
    """A run on `tiny-dit`, previewed with `tiny-turbo`."""
    config = a_config("tiny-dit", images, tmp_path / "run", preservation_weight=0.0, preview_every=2)
    config = replace(
        config, resolution=64, preview_steps=None, guidance_scale=None, preview_prompts=("a sks creature",)
    )
    return replace(config, preview_base="tiny-turbo")


def pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def previews(run):
    return [Image.open(path) for path in sorted(run.samples.glob("*.png"))]


@pytest.mark.parametrize("kind", ["dora", "nf4"])
def test_previews_are_what_the_sibling_draws_with_the_adapter(short, tmp_path, kind):
    """By its own steps and without guidance; the training is as ever, with dropout too, and nothing of it changes the sibling's weights."""
    config = replace(short, ema_decay=0.5, dropout=0.1, **({"quantize": kind} if kind == "nf4" else {"adapter": kind}))
    run = train(config)
    plain = train(replace(config, preview_base="", preview_every=0, out=tmp_path / "plain"))
    assert equal_states(adapter(run.folder, "transformer"), adapter(plain.folder, "transformer"))
    saved = from_yaml(run.config_file)
    assert (saved.preview_base, saved.preview_steps, saved.guidance_scale) == ("tiny-turbo", 4, 1.0)
    assert saved.learning_rate == 0.01  # of the base that is trained
    if kind == "nf4":
        return  # images are drawn with the base in full afterwards
    recipe = Recipe(
        prompt="a sks creature", adapters=(str(run.adapter),), strengths=(1.0,), steps=4, guidance_scale=1.0
    )
    drawn = {base: generate(replace(recipe, base=base, seed=config.seed))[0][0] for base in ("tiny-turbo", "tiny-dit")}
    shown = pixels(previews(run)[-1])
    assert (pixels(drawn["tiny-turbo"]) - shown).abs().max() <= 1 < (pixels(drawn["tiny-dit"]) - shown).abs().max()
    bare = generate(replace(recipe, base="tiny-turbo", adapters=(), strengths=(), seed=config.seed))[0][0]
    assert (pixels(bare) - shown).abs().max() > 1


def test_measured_and_sampled_with_it(short, tmp_path, monkeypatch):
    """Relative paths are found from elsewhere, and `sample --run` and `evaluate` draw as the previews are drawn."""
    (tmp_path / "turbo").symlink_to(resolve_base("tiny-turbo"))
    (prompts := tmp_path / "prompts.txt").write_text("a {token} {noun} on the beach\n")
    monkeypatch.chdir(tmp_path)
    config = replace(
        short,
        preview_base="turbo",
        preview_steps=4,
        guidance_scale=1.0,
        evaluate_every=2,
        evaluate_prompts=str(prompts),
    )
    run = train(replace(config, evaluate_images=config.images))
    assert [one.step for one in load_measurements(run)] == [0, 2]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = from_yaml(run.config_file)
    assert saved.preview_base == str(tmp_path / "turbo")
    main(["sample", "--run", str(run.folder), "--prompt", "a sks creature", "--out", "drawn"])
    recipe = read_recipe(Path("drawn/000000.png"))
    assert (recipe.base, recipe.steps, recipe.guidance_scale) == (str(tmp_path / "turbo"), 4, 1.0)
    assert drawing_defaults("tiny-dit", saved) == drawing_defaults("tiny-dit")
    assert any(
        name.startswith("the preview base's") for name in json.loads((run.folder / "data.json").read_text())["items"]
    )


def test_resume_and_queue(short, tmp_path):
    whole = train(replace(short, steps=3, out=tmp_path / "whole"))
    part = train_until(replace(short, steps=3, out=tmp_path / "part"), 2)
    resume(part.folder)
    assert equal_states(adapter(whole.folder, "transformer"), adapter(part.folder, "transformer"))
    assert [p.tobytes() for p in previews(whole)] == [p.tobytes() for p in previews(part)]
    main(["queue", str(write_config(replace(short, out=tmp_path / "queued"), tmp_path / "run.yaml"))])
    assert from_yaml(tmp_path / "queued" / "config.yaml").preview_base == "tiny-turbo"


@pytest.mark.campaign  # test_sharding.py draws previews in two processes
def test_two_processes(short, tmp_path):
    """Each has the preview base and draws its share."""
    config = replace(short, batch_size=4, preview_prompts=("a sks creature", "a sks creature in the snow"))
    one, two = train(config), replace(config, out=tmp_path / "two")
    run_in_two_processes(tmp_path, ["train", "subject", "--config", str(write_config(two, tmp_path / "two.yaml"))])
    shown = [[pixels(image) for image in previews(run)] for run in (one, Run(two.out))]
    assert [len(images) for images in shown] == [2, 2]
    assert max((a - b).abs().max() for a, b in zip(*shown, strict=True)) <= 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"base": "tiny"},
            "--preview-base tiny-turbo: the adapter does not fit its transformer, which has no such layer at",
        ),
        ({"preview_base": "tiny-dit"}, "is the base that is trained on"),
        ({"preview_base": "nowhere"}, "^--preview-base nowhere is neither a pipeline folder"),
        ({"train_text_encoder": True}, "does not go with --train-text-encoder"),
        ({"token": "<sks>", "num_vectors": 1}, "does not go with --num-vectors"),
        ({"prior_weight": 1.0}, "does not go with --prior-weight without --prior-folder"),
        ({"training_adapter": "undo"}, "does not go with --training-adapter"),
        ({"preview_steps": 2000}, "--preview-steps 2000"),
    ],
)
def test_what_does_not_fit_is_refused(short, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        preflight(replace(short, **settings))


def test_layers_of_other_shapes_are_refused(short, folders):
    with pytest.raises(UserError, match=r"does not fit its transformer, which has .* at transformer_blocks"):
        preflight(replace(short, preview_base=folders("sd3")))


def test_a_plan_counts_it(short):
    whole, more = plan(replace(short, preview_base="")), plan(short)
    assert more.base == 2 * whole.base
    assert more.working == whole.working


def test_without_images_it_has_no_effect(short):
    config = replace(short, preview_every=0, preview_steps=4, guidance_scale=1.0)
    assert any(line.startswith("--preview-base has no effect") for line in unused_settings(config))
