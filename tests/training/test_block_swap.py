"""Frozen blocks that wait in main memory: the same losses to the bit, and as many copies as there have to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from short_runs import adapter, equal_states, train_until

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import find_samples
from rankfold.training.engine.block_swap import find_block_swap, swappable_weights, swapped_numbers
from rankfold.training.engine.loop import comparable_config
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.task import SubjectTask


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def make_task(config):
    return SubjectTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))


KINDS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "preserving": {"preservation_weight": 1.0, "adapter": "dora"},
    "nf4": {"quantize": "nf4"},
    "int8": {"quantize": "int8", "gradient_checkpointing": True},
    "fp8": {"quantize": "fp8", "adapter": "glora", "adapter_options": {"form": "elementwise"}},
    "bf16": {"precision": "bf16", "gradient_accumulation": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_to_the_bit(images, tmp_path, kind):
    config = a_config("tiny-dit", images, tmp_path / "whole", preservation_weight=0.0)
    config = replace(config, resolution=64, steps=3, log_every=1, preview_every=3, preview_steps=2)
    config = replace(config, **KINDS[kind])
    whole = train(config)
    swapped = train(replace(config, out=tmp_path / "swapped", blocks_to_swap="all"))
    assert losses(swapped) == losses(whole)
    assert equal_states(adapter(swapped.folder, "transformer"), adapter(whole.folder, "transformer"))
    for one, other in zip(sorted(whole.samples.iterdir()), sorted(swapped.samples.iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()
