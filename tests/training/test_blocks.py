"""Blocks, ranks and learning rates by layer."""

from dataclasses import replace

import pytest
from accelerate import Accelerator
from family_runs import a_config

from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import find_samples
from rankfold.training.launch.start import preflight, train
from rankfold.training.subject.task import SubjectTask


def task_of(config):
    return SubjectTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))


@pytest.mark.parametrize("adapter", ["lora", "moslora", "glora"])
def test_ranks_and_rates_by_layer(config, adapter):
    """Ranks follow their patterns, the scale stays, and the rates are multiplied."""
    changes = {"rank_pattern": {"mid_block.*": 2}, "lr_pattern": {"up_blocks.*attn1.*": 0.1}}
    task = task_of(replace(config, adapter=adapter, rank=4, alpha=8.0, **changes))
    layers = adapter_layers(task.training.model.unet)
    for name, layer in layers.items():
        assert layer.r["default"] == (2 if name.startswith("mid_block") else 4)
        assert layer.scaling["default"] == 2.0
    named = {id(p): name for name, p in task.training.model.unet.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in task.parameter_groups() for p in group["params"]}
    for name, rate in rates.items():
        slow = name.startswith("up_blocks") and ".attn1." in name
        assert rate == pytest.approx(config.learning_rate * (0.1 if slow else 1.0))
    assert any(rate < config.learning_rate for rate in rates.values())


def test_blocks_of_sdxl(folders, photos, tmp_path):
    """By preset and by expression; the others carry nothing, and the adapter trains and is written."""
    config = a_config(folders("sdxl"), photos, tmp_path / "run", adapter="lora", steps=1, preservation_weight=0.0)
    whole = set(adapter_layers(task_of(config).training.model.unet))
    own = set(adapter_layers(task_of(replace(config, blocks="style")).training.model.unet))
    expected = {name for name in whole if name.startswith("up_blocks.0.attentions.1.")}
    assert own == expected
    assert (
        set(adapter_layers(task_of(replace(config, blocks=r"^up_blocks\.0\.attentions\.1")).training.model.unet)) == own
    )
    assert train(replace(config, blocks="style")).status()["state"] == "done"
    with pytest.raises(UserError, match=r"matches none of the layers .* Presets of this family are subject, style"):
        task_of(replace(config, blocks="nowhere"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"nowhere.*": 2}}, "--rank-pattern nowhere.* matches no adapted layer"),
        ({"lr_pattern": {"(": 2.0}}, "--lr-pattern . is not a regular expression"),
        ({"lr_pattern": {"mid_block.*": 0.0}}, "must be above 0"),
    ],
)
def test_mistakes(config, changes, words):
    config = replace(config, **changes)
    with pytest.raises(UserError, match=words):
        task_of(preflight(config)[0])
