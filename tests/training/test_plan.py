"""The plan against what is measured: bytes alive in a real step, by torch's profiler."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from PIL import Image
from tiny_families import BUILDERS, SIDE
from torch.utils.flop_counter import FlopCounterMode

from rankfold.apps.cli import main
from rankfold.toolkit.adapters.attach import trainable_parameters
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.launch.plan import disk_bytes, fit_to_memory, plan
from rankfold.training.launch.start import train
from rankfold.training.subject.task import SubjectTask

ALIKE = ("flux2-dev", "sd-v", "sd3-without-t5", "flux-schnell")  # whose steps are another's
FOLDERS = [pytest.param(name, marks=pytest.mark.campaign if name in ALIKE else ()) for name in BUILDERS]


@pytest.fixture(params=FOLDERS)
def folder(request, folders):
    return folders(request.param)


def measure_step(config):
    """Bytes: frozen weights of the denoiser, trainable parameters, and the peak of a step beside weights and gradients; operations."""
    task = SubjectTask(config, find_samples(config.images), resolve_base(config.base), Accelerator(cpu=True))
    batch = task.batch(0, list(range(config.batch_size)))
    with FlopCounterMode(display=False) as flops:
        task.module(batch).mean().backward()
    task.module.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task.module(batch).mean().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    parts = task.training.parts.values()
    frozen = sum(p.numel() * p.dtype.itemsize for part in parts for p in part.parameters() if not p.requires_grad)
    numbers = sum(p.numel() for part in parts for p in trainable_parameters(part))
    return frozen, numbers, peak - 4 * numbers, flops.get_total_flops()


@pytest.mark.parametrize(("adapter", "preserved"), [("lora", 0.0), ("moslora", 0.0), ("moslora", 1.0)])
def test_plan_of_the_embedded_model(photos, tmp_path, adapter, preserved):
    settings = {"adapter": adapter, "batch_size": 8, "preservation_weight": preserved}
    config = replace(a_config("tiny", photos, tmp_path / "run", **settings), resolution=64)
    check(config, 0.15)


def test_plan_of_checkpointing(photos, tmp_path):
    """What is recomputed is let go again: a step takes far less."""
    config = a_config("tiny", photos, tmp_path / "run", batch_size=8, preservation_weight=0.0)
    config = replace(config, resolution=64, gradient_checkpointing=True)
    check(config, 0.15)
    assert plan(config).working < 0.8 * plan(replace(config, gradient_checkpointing=False)).working


def test_plan_of_a_text_encoder(photos, tmp_path):
    config = a_config("tiny", photos, tmp_path / "run", adapter="moslora", batch_size=8, train_text_encoder=True)
    check(replace(config, resolution=64), 0.15)


@pytest.mark.parametrize(
    "settings",
    [
        {"prior_weight": 1.0, "prior_images": 2, "preview_steps": 1, "preservation_weight": 1.0},
        {"token": "<sks>", "num_vectors": 2},
    ],
)
def test_plan_of_the_tasks_own_batch(photos, tmp_path, settings):
    """Class images double the batch, a word of its own keeps the text encoders."""
    config = replace(a_config("tiny", photos, tmp_path / "run", batch_size=8), resolution=64, **settings)
    check(config, 0.15)
    assert plan(config).peak > plan(replace(config, prior_weight=0.0, num_vectors=0, token="sks")).peak


def test_plan_of_images_in_their_own_shape(photos, tmp_path):
    """The largest of them is what counts."""
    wide = tmp_path / "wide"
    wide.mkdir()
    for number, size in enumerate([(96, 64), (64, 64)]):
        Image.new("RGB", size, (90, 20 * number, 0)).save(wide / f"{number}.png")
    config = replace(a_config("tiny", wide, tmp_path / "run", batch_size=8), resolution=64, crop="bucket")
    bucketed, square = plan(config), plan(replace(config, crop="center"))
    assert bucketed.base == square.base
    assert bucketed.working != square.working


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--learning-rate", "inf"), "--learning-rate must be a finite number"),
        (("--optimizer", "Foo"), "--optimizer Foo is neither"),
        (("--adapter", "foo"), "there is no such adapter"),
        (("--resolution", "63"), "cannot be divided"),
        (("--images", "nowhere"), "nowhere"),
    ],
)
def test_a_plan_is_refused_what_training_is(capsys, flags, sentence):
    for command in ("plan", "train"):
        with pytest.raises(SystemExit, match="2"):
            main([command, "subject", "--base", "tiny", *flags])
        assert command == "train" or sentence in capsys.readouterr().err


WITH_TEXT = [
    pytest.param(name, text, marks=pytest.mark.campaign if name in ALIKE or (text and name == "flux2-klein") else ())
    for name in BUILDERS
    for text in (False, True)
]  # klein's text encoder takes half a minute


@pytest.mark.parametrize(("name", "text"), WITH_TEXT)
def test_plan_of_every_family(folders, photos, tmp_path, name, text):
    """At sizes where tensors and not their overheads fill the memory."""
    folder = folders(name)
    settings = {"adapter": "moslora", "batch_size": 4, "train_text_encoder": text}
    config = replace(a_config(folder, photos, tmp_path / "run", **settings), resolution=2 * SIDE)
    check(config, 0.15)


def check(config, share):
    """The plan is within this share of the measured peak."""
    estimate = plan(config)
    frozen, numbers, working, flops = measure_step(config)
    assert estimate.base == frozen
    assert estimate.parameters == numbers
    assert estimate.working == pytest.approx(working, rel=share)
    assert estimate.flops == pytest.approx(flops, rel=share)


def test_plan_of_disk(photos, tmp_path):
    config = replace(
        a_config("tiny", photos, tmp_path / "run", rank=8), steps=3, checkpoint_every=1, keep_checkpoints=2
    )
    run = train(config).folder
    files = {*run.rglob("*.safetensors"), *(run / "checkpoints").rglob("*.*")}
    size = sum(file.stat().st_size for file in files)
    assert disk_bytes(plan(config)) == pytest.approx(size, rel=0.15)


def test_training_can_be_made_to_fit(photos, tmp_path, capsys):
    config = replace(a_config("tiny", photos, tmp_path / "run", batch_size=8), resolution=64)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    fit = 0.7 * plan(config).peak / 2**30
    main(["train", "subject", "--config", str(tmp_path / "run.yaml"), "--steps", "1", "--fit", str(fit)])
    assert "with: --precision bf16" in capsys.readouterr().out
    assert from_yaml(tmp_path / "run" / "config.yaml") == replace(config, precision="bf16", steps=1)


def test_fitting_takes_no_more_than_it_must(photos, tmp_path):
    config = replace(a_config("tiny", photos, tmp_path / "run", batch_size=8), resolution=64)
    whole = plan(config)
    gib = whole.peak / 2**30
    assert fit_to_memory(whole, gib * 1.01) == ([], whole)
    smallest = fit_to_memory(whole, gib * 0.2)[1]
    assert (smallest.config.batch_size, smallest.config.gradient_accumulation) == (1, 8)  # as many images in a step
    with pytest.raises(UserError, match=r"still takes .* lower --resolution"):
        fit_to_memory(smallest, gib / 1000)
    flags, estimate = fit_to_memory(whole, gib * 0.7)
    assert flags == ["--precision bf16"]
    assert estimate.config == replace(config, precision="bf16")
    assert estimate.peak <= 0.7 * whole.peak


def test_a_plan_carries_out_a_step_only_where_it_is_another(photos, tmp_path):
    config = replace(a_config("tiny", photos, tmp_path / "run", batch_size=8), resolution=64)
    whole, change = plan(config), {"optimizer": "AdamW8bit", "quantize": "nf4"}
    assert whole.with_settings(change) == plan(replace(config, **change))
    assert whole.with_settings(change).step is whole.step


def test_plan_on_the_command_line(capsys):
    main(["plan", "subject", "--base", "tiny", "--batch-size", "8", "--preservation-weight", "0"])
    said = capsys.readouterr().out
    assert "trainable params" in said
    assert "with --precision bf16" in said
    main(["plan", "subject", "--base", "tiny", "--preservation-weight", "0", "--fit", "8"])
    assert "fits in 8 GiB as it is" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "subject", "--fit", "0"])
    assert "--fit must be above 0" in capsys.readouterr().err
