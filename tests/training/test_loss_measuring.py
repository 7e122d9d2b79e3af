"""--evaluate-prompts none: the validation loss alone, no image drawn, stops a run and chooses its step."""

import json
from dataclasses import replace
from functools import wraps

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from short_runs import adapter, train_until

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.evaluation import measuring
from rankfold.training.launch.cross_validation import cross_validate
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.loss_measuring import LossMeasurement


@pytest.fixture
def measured(config):
    return replace(config, learning_rate=0.02, evaluate_every=2, evaluate_prompts="none", preview_every=0)


def test_nothing_is_drawn_and_the_least_loss_is_kept(measured, monkeypatch):
    @wraps(StableDiffusionPipeline.__call__)  # defaults of guidance are read from the signature
    def refuse(*_, **__):
        pytest.fail("an image was drawn")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", refuse)
    run = train(replace(measured, keep="best"))
    base, *steps = measuring.load_measurements(run, LossMeasurement)
    assert (base.step, [one.step for one in steps]) == (0, [2, 4, 6])
    rows = [row for row in run.metrics() if "validation_loss" in row]
    for one, row in zip((base, *steps), rows, strict=True):
        assert float(-one.values_N.mean()) == pytest.approx(row["validation_loss"])
        assert "likeness" not in row
    choice = json.loads((run.folder / "choice.json").read_text(encoding="utf-8"))
    means = {one.step: float(one.values_N.mean()) for one in steps}
    assert choice["best"] == max(means, key=lambda step: means[step])
    assert choice["step"] == min(choice["alike"])
    theirs = load_file(measuring.snapshot_folder(run, choice["step"]) / "unet" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in adapter(run.folder).items())


def test_a_loss_that_rises_ends_the_run(measured):
    """At such a rate the first steps already spoil what the base can do."""
    run = train(replace(measured, learning_rate=1.0, steps=40, patience=2))
    steps = [one.step for one in measuring.load_measurements(run, LossMeasurement)]
    assert steps[-1] < 40
    assert run.status()["step"] == steps[-1]


def test_a_resumed_run_measures_the_same(measured):
    whole = train(measured)
    part = train_until(replace(measured, out=measured.out.parent / "part"), 3)
    resume(part.folder)
    found = [measuring.load_measurements(run, LossMeasurement) for run in (whole, Run(part.folder))]
    assert found[0] == found[1]


def test_intervals_are_over_images_where_there_are_some():
    rows = ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))
    assert LossMeasurement(0, rows).groups == ["0", "0", "1", "1", "2", "2"]
    assert LossMeasurement(0, rows[:1]).groups == ["0", "1"]


def test_what_makes_no_sense_is_refused(measured):
    with pytest.raises(UserError, match="--evaluate-prompts none draws none"):
        preflight(replace(measured, evaluate_clip="embedded"))
    with pytest.raises(UserError, match="other --evaluate-prompts than none"):
        cross_validate(measured, 2)
