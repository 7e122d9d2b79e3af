"""Frozen blocks that wait in main memory: the same losses to the bit, and as many copies as there have to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from forked import run_in_two_processes
from short_runs import adapter, equal_states, train_until, write_config

from rankfold.apps.cli import main
from rankfold.apps.studio.widgets.fields import fields_of, from_input_value, values_to_yaml
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml_text
from rankfold.training.engine import block_swap
from rankfold.training.engine.block_swap import WaitingTensor, find_block_swap, swapped_numbers
from rankfold.training.engine.loop import comparable_config
from rankfold.training.launch import savings as rungs
from rankfold.training.launch.plan import fit_to_memory, plan
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.task import SubjectTask


@pytest.fixture
def short(images, tmp_path):
    """A run of three steps on `tiny-dit`, which has five blocks."""
    config = a_config("tiny-dit", images, tmp_path / "whole", preservation_weight=0.0)
    return replace(config, resolution=64, steps=3, log_every=1)


@pytest.fixture
def spoilt(monkeypatch):
    """What waits is all ones, bit by bit, for whoever reads it out of its turn: NaN, where it is of floating point."""

    def drop(self):
        ones = torch.full_like(self.on_host.view(torch.uint8), 255)
        self.point_to(ones.view(self.on_host.dtype))
        self.on_device.untyped_storage().resize_(0)

    monkeypatch.setattr(WaitingTensor, "drop", drop)


def alike_in_the_campaign(names, *alike):
    """Names as parameters; those whose like is among the others stay out of the gate."""
    return [pytest.param(name, marks=pytest.mark.campaign if name in alike else ()) for name in names]


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def make_task(config):
    return SubjectTask(config, find_samples(config.images), resolve_base(config.base), Accelerator(cpu=True))


def files(run):
    return [path.read_bytes() for path in sorted(run.samples.iterdir())]


KINDS = {
    "plain": {"preview_every": 3, "preview_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "preserving": {"preservation_weight": 1.0, "adapter": "dora"},
    "nf4": {"quantize": "nf4"},
    "int8": {"quantize": "int8", "gradient_checkpointing": True},
    "fp8": {"quantize": "fp8", "adapter": "glora", "adapter_options": {"form": "elementwise"}},
    "bf16": {"precision": "bf16", "gradient_accumulation": 2},
}


@pytest.mark.parametrize("kind", alike_in_the_campaign(KINDS, "bf16", "int8"))
def test_the_same_to_the_bit(short, spoilt, tmp_path, kind):
    """Losses, adapters and previews, and nothing is computed with what waits."""
    config = replace(short, **KINDS[kind])
    whole = train(config)
    swapped = train(replace(config, out=tmp_path / "swapped", blocks_to_swap="all"))
    assert losses(swapped) == losses(whole)
    assert equal_states(adapter(swapped.folder, "transformer"), adapter(whole.folder, "transformer"))
    assert files(swapped) == files(whole)


@pytest.mark.parametrize("name", ["tiny", "tiny-kontext"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_in_any_order(short, spoilt, name, checkpointed):
    """A UNet's blocks run in another order than they are listed in, and FLUX's are of two kinds that return two tensors."""
    config = replace(short, base=name, gradient_checkpointing=checkpointed, preservation_weight=1.0)
    if name == "tiny-kontext":
        config = replace(config, references=(config.images,))
    gradients = []
    for count in (0, "all"):
        task = make_task(replace(config, blocks_to_swap=count))
        for position in (0, 2):
            task.module(task.batch(position, [0, 1])).mean().backward()
        gradients.append([p.grad for group in task.parameter_groups() for p in group["params"]])
    assert len(gradients[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_copies_are_counted(short, checkpointed):
    """Each block comes once in each pass, but for the one that ended the pass before, which stays; one comes ahead."""
    task = make_task(replace(short, blocks_to_swap=4, gradient_checkpointing=checkpointed))
    swap = find_block_swap(task.module)
    most = []
    for own in swap.blocks:
        own.module.register_forward_pre_hook(lambda *_: most.append(sum(block.loaded for block in swap.blocks)))
    copies = []
    for position in (0, 2, 4, 6):
        before = swap.copies
        task.module(task.batch(position, [0, 1])).mean().backward()
        copies.append(swap.copies - before)
    assert copies[1:] == [2 * (4 - 1)] * 3
    assert max(most) == 2
    held = [tensor.on_device.untyped_storage().nbytes() > 0 for block in swap.blocks for tensor in block.tensors]
    assert 0 < sum(held) <= len(held) / 2
    with torch.no_grad():
        before = swap.copies
        for _ in range(3):
            task.module(task.batch(0, [0, 1]))
    assert swap.copies - before <= 3 * 4 + 2


def test_a_block_that_is_left_out_does_no_harm(short, spoilt):
    """The wrong one came ahead: it goes again, and the right one is brought."""
    task = make_task(replace(short, blocks_to_swap="all"))
    swap, model = find_block_swap(task.module), task.training.model.transformer
    expected = task.module(task.batch(0, [0, 1])).detach()
    blocks = model.transformer_blocks
    model.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[2], blocks[4]])
    task.module(task.batch(0, [0, 1])).mean().backward()
    model.transformer_blocks = blocks
    assert torch.equal(task.module(task.batch(0, [0, 1])), expected)
    assert sum(block.loaded for block in swap.blocks) <= 2


def test_resume_is_exact_and_may_swap_others(short, tmp_path):
    whole = train(replace(short, out=tmp_path / "whole"))
    part = train_until(replace(short, out=tmp_path / "part", blocks_to_swap="all"), 2)
    text = part.config_file.read_text(encoding="utf-8")
    assert "blocks_to_swap: all" in text
    part.config_file.write_text(text.replace("blocks_to_swap: all", "blocks_to_swap: 3"), encoding="utf-8")
    resume(part.folder)
    assert equal_states(adapter(whole.folder, "transformer"), adapter(part.folder, "transformer"))
    assert comparable_config(short) == comparable_config(replace(short, blocks_to_swap=3))


def test_two_processes(short, tmp_path):
    names = ("whole", "swapped")
    configs = [
        replace(short, batch_size=4, out=tmp_path / name, blocks_to_swap=count, gradient_checkpointing=True)
        for name, count in zip(names, (0, "all"), strict=True)
    ]
    lines = [["train", "subject", "--config", str(write_config(c, tmp_path / f"{c.out.name}.yaml"))] for c in configs]
    run_in_two_processes(tmp_path, *lines)
    one, other = (Run(tmp_path / name) for name in names)
    assert other.status()["processes"] == 2
    assert losses(one) == losses(other)
    assert equal_states(adapter(one.folder, "transformer"), adapter(other.folder, "transformer"))


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_training_adapter_changes_places_with_what_waits(short, images, tmp_path, kind):
    undo = train(replace(short, out=tmp_path / "undo", learning_rate=0.1)).adapter
    config = replace(short, quantize=kind, training_adapter=undo, preview_every=1, preview_steps=2)
    whole = train(replace(config, out=tmp_path / "whole"))
    swapped = train(replace(config, out=tmp_path / "swapped", blocks_to_swap="all"))
    assert losses(swapped) == losses(whole)
    assert files(swapped) == files(whole)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"blocks_to_swap": 2}, "two are on the device at a time, so take 3 to 5, or all"),
        ({"blocks_to_swap": 6}, "this base has 5, so take 3 to 5, or all"),
        ({"blocks_to_swap": 3, "compile": True}, "does not go with --compile"),
        ({"blocks_to_swap": -1}, "--blocks-to-swap must be"),
    ],
)
def test_what_cannot_be_swapped_is_refused(short, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        preflight(replace(short, **settings))


def test_a_base_with_two_blocks():
    with pytest.raises(UserError, match="saves nothing on this base, which has 2 blocks"):
        block_swap.check_count("all", 2)


def test_blocks_are_spread():
    assert swapped_numbers("all", 4) == [0, 1, 2, 3]
    assert swapped_numbers(3, 7) == [0, 2, 4]


@pytest.mark.parametrize("kind", alike_in_the_campaign(("none", "nf4", "int8", "fp8"), "none", "int8"))
def test_a_plan_counts_what_waits(short, kind):
    """To the byte; the scales of fp8, which wait beside the codes, a plan leaves on the device."""
    config = replace(short, quantize=kind)
    whole, swapped = plan(config), plan(replace(config, blocks_to_swap=4))
    task = make_task(replace(config, blocks_to_swap=4))
    sizes = [
        sum(tensor.bytes for tensor in own.tensors if kind != "fp8" or tensor.on_host.shape[1] > 1)
        for own in find_block_swap(task.module).blocks
    ]
    assert swapped.swapped == sizes
    pair = max(a + b for a, b in zip(swapped.swapped, swapped.swapped[1:], strict=False))
    assert whole.base - swapped.base == sum(swapped.swapped) - pair
    assert whole.with_settings({"blocks_to_swap": 4}) == swapped


def test_fit_swaps_as_few_as_it_must(short, monkeypatch):
    """Before anything is quantised, and on devices with a memory of their own only."""
    config = replace(short, precision="bf16", gradient_checkpointing=True, batch_size=1)
    whole = plan(config)
    four = whole.with_settings({"blocks_to_swap": 4})
    gib = four.peak / 2**30
    assert all("swap" not in flag for flag, _ in rungs.savings(config))
    monkeypatch.setattr(rungs, "has_own_memory", lambda kind: True)
    monkeypatch.setattr(rungs, "check_optimizer", lambda config: None)
    flags, estimate = fit_to_memory(plan(replace(config, optimizer="AdamW8bit")), gib)
    assert flags == ["--blocks-to-swap 4"]
    assert estimate.config.blocks_to_swap == 4
    assert all("swap" not in flag for flag, _ in rungs.savings(replace(config, compile=True)))


def test_the_command_line(capsys):
    main(["plan", "subject", "--base", "tiny-dit", "--preservation-weight", "0", "--blocks-to-swap", "all"])
    assert "GiB for the 5 blocks that are swapped" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "value"), [("20", 20), ("all", "all"), ("", 0)])
def test_a_number_or_all_in_the_studio(text, value):
    field = next(one for one in fields_of(SubjectConfig) if one.name == "blocks_to_swap")
    config = values_to_yaml("subject", {"blocks_to_swap": from_input_value(field, text)})
    assert from_yaml_text(config, "the form").blocks_to_swap == value


def test_neither_a_number_nor_all():
    with pytest.raises(
        UserError, match=r"'blocks_to_swap' cannot be 'many': .*valid integer.*, or input should be 'all'"
    ):
        from_yaml_text("blocks_to_swap: many", "run.yaml")


def test_a_run_says_where_nothing_is_saved(short, capsys):
    train(replace(short, steps=1, blocks_to_swap=3))
    assert "--blocks-to-swap saves memory of a GPU only" in capsys.readouterr().out
