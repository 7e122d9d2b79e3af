"""Guidance in the target of the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.training.launch.plan import plan
from rankfold.training.launch.start import preflight
from rankfold.training.subject.task import SubjectTask


@pytest.fixture
def short(images, tmp_path):
    return replace(a_config("tiny-turbo", images, tmp_path / "run", preservation_weight=0.0), resolution=64)


def make_task(config):
    return SubjectTask(config, find_samples(config.images), resolve_base(config.base), Accelerator(cpu=True))


@pytest.mark.parametrize("base", ["tiny", "tiny-turbo"])
def test_the_target_leads_away_from_no_words(short, base):
    """By the formula, written out once more; a row without words, as caption dropout makes them, has the plain target."""
    task = make_task(replace(short, base=base, target_guidance=3.0))
    module, batch = task.module, task.batch(0, [0, 1])
    empty = int(task.training.prompts.numbers_of([""]))
    batch["prompt"][1] = empty
    clean = batch["mean"] + batch["std"] * batch["posterior_noise"]
    noisy = module.noise.add_noise(clean, batch["noise"], batch["timesteps"])
    target = module.noise.target(clean, batch["noise"], batch["timesteps"])
    with torch.no_grad():
        pred = module.predict(noisy, batch["timesteps"], batch["prompt"])
        without = module.predict(noisy, batch["timesteps"], torch.full_like(batch["prompt"], empty))
        guided = torch.stack([without[0] + 3 * (target[0] - without[0]), target[1]])
        assert torch.allclose(module(batch), (pred - guided).square().flatten(1).mean(1), rtol=1e-4)


def test_without_it_the_loss_is_plain(short):
    assert make_task(short).module.guidance is None


def test_a_plan_counts_the_pass_more(short):
    """One of four, where forward and back are three."""
    plain, guided = plan(short), plan(replace(short, target_guidance=3.0))
    assert guided.flops / plain.flops == pytest.approx(1.4, abs=0.15)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"training_adapter": "undo"}, "which takes the guidance out of the base"),
        ({"target_guidance": 0.0}, "--target-guidance must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(short, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        preflight(replace(short, **({"target_guidance": 3.0} | settings)))


def test_prompts_that_see_references(short, folders):
    with pytest.raises(UserError, match="whose prompts see the references"):
        plan(replace(short, base=folders("qwen-image-edit"), images=None, class_noun="dog", target_guidance=2.0))
