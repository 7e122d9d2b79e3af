"""What changes the loss and the data: preservation, masks, buckets, captions, noise; each by what it is to do."""

import importlib.util
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from settings import quick_config
from short_runs import train_until
from torch import nn

from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.quantize import FrozenLinear, quantize_model
from rankfold.toolkit.core.randomness import generator
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import open_model
from rankfold.toolkit.diffusion.noise import FlowNoise
from rankfold.toolkit.embedded import world
from rankfold.toolkit.formats.adapter_folder import WEIGHTS
from rankfold.training.config.checks import check_ranges
from rankfold.training.config.compose import ComposeConfig, ComposeInstructConfig
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.unused import unused_settings
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.engine.loop import make_schedule
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.prompts import without_token
from rankfold.training.subject.rows import pick_rows, shuffle_tags
from rankfold.training.subject.sizes import bucket_size
from rankfold.training.subject.summary import summarize_images
from rankfold.training.subject.task import SubjectTask


@pytest.fixture
def config(base, images, tmp_path):
    return quick_config(
        SubjectConfig,
        base=str(base),
        images=images,
        out=tmp_path / "run",
        steps=3,
        batch_size=4,
        learning_rate=0.05,
        preview_every=0,
        threads=1,
    )


def task_of(config):
    return SubjectTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))


# ---------------------------------------------------------------------------------------------- preservation


@pytest.mark.parametrize("text", [False, True])
def test_preservation_is_nothing_at_the_start_and_something_behind(config, text):
    """The untrained adapter says what the model says; a disturbed one does not, and its gradient leads back."""
    task = task_of(replace(config, preservation_weight=1.0, train_text_encoder=text))
    batch = task.batch(0, [0, 1, 2, 3])
    plain = {k: v for k, v in batch.items() if not k.startswith("preservation")}
    assert batch["preservation"].tolist() == [0]
    torch.testing.assert_close(task.module(batch), task.module(plain))
    with torch.no_grad():
        for group in task.parameter_groups():
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    more = task.module(batch) - task.module(plain)
    assert more[0] > 1e-6
    assert torch.equal(more[1:], torch.zeros(3))
    more[0].backward()
    assert any(p.grad is not None and p.grad.any() for g in task.parameter_groups() for p in g["params"])


def test_the_rows_that_are_kept_do_not_depend_on_the_batch(config):
    """One row in four stands for four, whichever batch it falls into."""
    for size in (1, 3, 4, 6):
        task, kept = task_of(replace(config, preservation_weight=0.5, batch_size=size)), []
        for position in range(0, 12, size):
            batch = task.batch(position, list(range(size)))
            if "preservation" in batch:
                kept += [position + row for row in batch["preservation"].tolist()]
                assert set(batch["preservation_weight"].tolist()) == {2.0}
        assert kept == [0, 4, 8]


def test_class_images_and_preservation_keep_their_weights_together(config):
    """Both count for the mean over the images of the subject, whatever else is in the batch."""
    config = replace(config, preservation_weight=0.5, prior_weight=0.25, prior_images=2, preview_steps=2)
    batch = task_of(config).batch(0, [0, 1, 2, 3])
    assert batch["preservation_weight"].sum() / len(batch["weight"]) == 0.5
    assert batch["weight"][4:].sum() / len(batch["weight"]) == 0.25


def test_captions_without_the_token(config):
    assert without_token("a large sks creature, in the snow", config) == "a large creature, in the snow"
    assert without_token("sks, red", config) == "red"
    assert without_token("a thing", config) == "a creature"


def test_preservation_in_training(config):
    with_it = train(replace(config, preservation_weight=1.0, out=config.out / "a"))
    without = train(replace(config, preservation_weight=0.0, out=config.out / "b"))
    file = "adapter/unet/adapter_model.safetensors"
    assert (with_it.folder / file).read_bytes() != (without.folder / file).read_bytes()


# ---------------------------------------------------------------------------------------------- compiling


@pytest.mark.campaign  # more than a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_compiled_blocks_learn_the_same(folders, images, tmp_path):
    """Blocks that diffusers names (a UNet's) and blocks in a transformer's own list; previews in between go on without harm."""
    for name in ("sd", "sd3-without-t5"):
        config = quick_config(
            SubjectConfig,
            base=str(folders(name)),
            images=images,
            steps=4,
            batch_size=2,
            resolution=32,
            log_every=1,
            preview_every=2,
            preview_steps=1,
            threads=1,
            out=tmp_path / "plain",
        )
        plain, compiled = train(config), train(replace(config, compile=True, out=tmp_path / "compiled"))
        for a, b in zip(plain.metrics(), compiled.metrics(), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------- several subjects


def test_several_subjects_in_one_adapter(config, tmp_path):
    """Each has its own prompt, loses its own token for preservation, and is previewed."""
    cats = tmp_path / "cats"
    cats.mkdir()
    for number, (image, _) in enumerate(world.subject_images(4_000_009, 3)):
        image.save(cats / f"{number}.png")
    (cats / "0.txt").write_text("a large sks2 cat at night")
    config = replace(config, also={"sks2 cat": str(cats)}, preview_every=3, preview_steps=2)
    _, (samples, _) = preflight(config)
    task = SubjectTask(config, samples, config.base, Accelerator(cpu=True))
    (rows,), texts = task.training.data.instance, list(task.training.prompts.numbers)
    assert len(rows) == 8
    assert [texts[n] for n in rows.prompts[4:, 0].tolist()] == [
        "a sks creature", "a large sks2 cat at night", "a sks2 cat", "a sks2 cat",
    ]  # fmt: skip
    assert [texts[n] for n in rows.without_token[4:].tolist()] == [
        "a creature", "a large cat at night", "a cat", "a cat",
    ]  # fmt: skip
    run = train(config)
    assert from_yaml(run.config_file) == config
    assert len(list(run.samples.glob("*.png"))) == 2 * len(config.preview_prompts)
    assert json.loads((run.adapter / "rankfold.json").read_text(encoding="utf-8"))["also"] == ["sks2 cat"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"also": {"cat": "FOLDER"}}, "must be a token and a class noun"),
        ({"also": {"sks cat": "FOLDER"}}, "name the same token twice"),
        ({"also": {"sks2 cat": "FOLDER"}, "prior_weight": 1.0}, "--prior-weight knows one subject only"),
        ({"also": {"sks2 cat": "FOLDER"}, "num_vectors": 1}, "--num-vectors knows one subject only"),
        ({"also": {"sks2 cat": "nowhere"}}, "--also nowhere is not a folder"),
    ],
)
def test_subjects_that_cannot_be_told_apart(config, changes, message):
    with pytest.raises(UserError, match=message):
        preflight(replace(config, **changes))


# ---------------------------------------------------------------------------------------------- masks


@pytest.fixture
def masks(images, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in images.glob("*.png"):
        mask = Image.new("L", Image.open(path).size)
        ImageDraw.Draw(mask).rectangle((0, 0, mask.width // 2 - 1, mask.height), fill=255)
        mask.save(folder / path.name)
    return folder


def test_what_is_masked_out_has_no_part_in_the_loss(config, masks):
    task = task_of(replace(config, masks=str(masks)))
    batch = task.batch(0, [0, 1])
    width = batch["mask"].shape[3]
    assert batch["mask"][:, :, :, width // 2 :].max() == 0
    torch.testing.assert_close(batch["mask"].mean((1, 2, 3)), torch.ones(2))
    seen = task.module(batch)
    spoiled = dict(batch, noise=batch["noise"].clone())
    guess = task.module.predict
    task.module.predict = lambda *given: guess(*given).index_fill(3, torch.arange(width // 2, width), 7.0)
    assert torch.equal(task.module(spoiled), seen)
    soft = task_of(replace(config, masks=str(masks), unmasked_weight=0.5)).batch(0, [0])["mask"]
    assert soft.min() / soft.max() == pytest.approx(0.5)


def test_masks_with_class_images(config, masks):
    batch = task_of(replace(config, masks=str(masks), prior_weight=1.0, prior_images=2, preview_steps=1)).batch(0, [0])
    assert batch["mask"].shape[0] == 2
    assert torch.equal(batch["mask"][1], torch.ones_like(batch["mask"][1]))


def test_mask_mistakes(config, masks):
    Image.new("L", (9, 9)).save(next(masks.glob("*.png")))
    with pytest.raises(UserError, match="9 x 9"):
        train(replace(config, masks=str(masks)))
    next(masks.glob("*.png")).unlink()
    with pytest.raises(UserError, match="has no mask"):
        train(replace(config, masks=str(masks)))
    with pytest.raises(UserError, match="no transparency"):
        train(replace(config, masks="alpha"))


# ---------------------------------------------------------------------------------------------- buckets


def test_buckets_keep_shape_and_area():
    for width, height in ((512, 512), (600, 400), (400, 600), (1000, 700), (2000, 500), (500, 2000), (513, 511)):
        across, down = bucket_size(width, height, 512, 64)
        assert across % 64 == down % 64 == 0
        assert across * down <= 512 * 512 * 1.13
        assert across * down >= 512 * 512 * 0.75
        shape = min(max(width / height, 0.5), 2)
        assert abs(across / down / shape - 1) < 0.16
    assert bucket_size(64, 64, 64, 8) == (64, 64)


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_every_image_is_drawn_as_often_whatever_its_shape(batch):
    sizes = [5, 1, 3]
    batches = sum(sizes)
    for epoch in range(3):
        drawn = Counter()
        for number in range(epoch * batches, (epoch + 1) * batches):
            bucket, rows = pick_rows(sizes, 7, number * batch, batch)
            assert len(rows) == batch
            drawn.update((bucket, row) for row in rows)
        assert len(drawn) == sum(sizes)
        assert set(drawn.values()) == {batch}
    assert pick_rows(sizes, 7, 0, batch) == pick_rows(sizes, 7, 0, batch)
    assert len({str(pick_rows(sizes, seed, 0, 1)) for seed in range(20)}) > 3


@pytest.mark.parametrize(("crop", "sizes"), [("center", 2), ("bucket", 4)])
def test_every_image_is_trained_at_every_resolution(crop, sizes, tmp_path, config):
    """As often at each; the summary says the same; class images are of one size, so prior preservation is refused."""
    images = tmp_path / "shapes"
    images.mkdir()
    for name, size in (("square", (64, 64)), ("wide", (96, 48))):
        Image.new("RGB", size, (200, 60, 60)).save(images / f"{name}.png")
    config = replace(config, images=images, resolution=64, extra_resolutions=(32,), crop=crop, batch_size=1)
    _, (samples, base) = preflight(config)
    task = SubjectTask(config, samples, base, Accelerator(cpu=True))
    shapes = Counter(tuple(task.batch(n, [0])["mean"].shape[2:]) for n in range(4))
    assert len(shapes) == sizes
    assert set(shapes.values()) == {4 // sizes}
    assert (8, 8) in shapes
    assert (4, 4) in shapes
    found = summarize_images(config, samples, open_model(base))
    assert {(own.height // 8, own.width // 8): own.share for own in found.buckets} == {
        shape: count / 4 for shape, count in shapes.items()
    }
    train(config)
    with pytest.raises(UserError, match="--prior-weight works with one --resolution only"):
        preflight(replace(config, crop="center", prior_weight=1.0))
    with pytest.raises(UserError, match="--extra-resolutions 36 cannot be divided by 8"):
        preflight(replace(config, extra_resolutions=(36,)))
    with pytest.raises(UserError, match="--extra-resolutions must be at least 1, not 0"):
        preflight(replace(config, extra_resolutions=(0,)))


def test_buckets_take_turns_evenly():
    sizes = [90, 10]
    seen = [pick_rows(sizes, 3, number * 2, 2)[0] for number in range(50)]
    assert all(abs(seen[:n].count(1) - n / 10) <= 1.01 for n in range(1, 51))


def test_images_of_any_shape_train(config, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, size in enumerate(((64, 64), (96, 48), (48, 96), (64, 60))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.png")
    config = replace(config, images=folder, crop="bucket", batch_size=2)
    task = task_of(config)
    shapes = {tuple(rows.mean.shape[2:]) for rows in task.training.data.instance}
    assert len(shapes) == 3
    assert sum(len(rows) for rows in task.training.data.instance) == 4
    assert train(config).status()["state"] == "done"
    with pytest.raises(UserError, match="--prior-weight"):
        train(replace(config, prior_weight=1.0, out=tmp_path / "other"))


# ---------------------------------------------------------------------------------------------- captions and noise


def test_caption_dropout(config):
    task = task_of(replace(config, caption_dropout=0.3))
    numbers = torch.cat([task.batch(4 * n, [0, 1, 2, 3])["prompt"] for n in range(150)])
    assert 0.22 < (numbers == task.training.prompts.numbers[""]).float().mean() < 0.38


def test_caption_orders(config, tmp_path):
    said = shuffle_tags("a sks creature, red, in the snow, smiling", 6, 0)
    assert len(said) == 7
    assert all(text.startswith("a sks creature, ") for text in said)
    assert all(sorted(text.split(", ")) == sorted(said[0].split(", ")) for text in said)
    assert len(set(said)) > 3
    assert shuffle_tags("a sks creature", 6, 0) == ["a sks creature"]
    own = shutil.copytree(config.images, tmp_path / "own")  # other tests use the same images, without captions
    for path in own.glob("*.png"):
        path.with_suffix(".txt").write_text("a sks creature, red, small, happy")
    task = task_of(replace(config, images=own, caption_orders=3))
    assert len({int(n) for k in range(40) for n in task.batch(4 * k, [0, 1, 2, 3])["prompt"]}) > 1


def test_noise_offset(config):
    plain, offset = (task_of(replace(config, noise_offset=amount)).batch(0, [0, 1]) for amount in (0.0, 0.5))
    shift = offset["noise"] - plain["noise"]
    assert torch.allclose(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-6)
    assert shift.std() > 0.1


def test_flow_noise():
    """Clean and noise are what noisy latents and the target say; levels follow the sampler."""
    noise = FlowNoise()
    clean, other, levels = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    noisy, goal = noise.add_noise(clean, other, levels), noise.target(clean, other, levels)
    s = levels.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - s * goal, clean)
    torch.testing.assert_close(noisy + (1 - s) * goal, other)

    def levels(**given):
        drawn = torch.cat([FlowNoise(**given).sample_timestep(generator(0, n), 8, 8) for n in range(2000)])
        return float(drawn.mean()), float(drawn.std())

    assert levels(sampling="uniform") == pytest.approx((0.5, 0.289), abs=0.02)
    assert levels(sampling="logit_normal") == pytest.approx((0.5, 0.208), abs=0.02)
    assert levels(sampling="mode") == pytest.approx((0.5, 0.22), abs=0.03)
    assert levels(sampling="logit_normal", shift=lambda height, width: 3.0)[0] > 0.65


def test_weighing_timesteps(config):
    """Each row's loss is the plain one times its own weight."""
    batch = task_of(config).batch(0, [0, 1, 2, 3])
    batch = {key: value for key, value in batch.items() if not key.startswith("preservation")}
    plain = task_of(config).module(batch)
    for changes, weight in (({"min_snr_gamma": 5.0}, lambda snr: snr.clamp(max=5.0)), ({"debiased": True}, torch.sqrt)):
        task = task_of(replace(config, **changes))
        expected = (
            plain
            * weight(task.training.noise.snr(batch["timesteps"]))
            * task.training.noise.clean_error_ratio(batch["timesteps"])
        )
        torch.testing.assert_close(task.module(batch), expected)
    with pytest.raises(UserError, match="leave one of them out"):
        check_ranges(replace(config, debiased=True, min_snr_gamma=5.0))


# ---------------------------------------------------------------------------------------------- optimizers and dtypes


ALIKE = ("Lion8bit", "CAME")  # resumed as AdamW8bit and Prodigy are


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.campaign if name in ALIKE else ())
        for name in ("AdamW8bit", "Lion8bit", "Prodigy", "AdamWScheduleFree", "CAME")
    ],
)
def test_other_optimizers_learn_and_resume(config, name):
    """The loss falls, and a stopped run ends where one that went on does."""
    rate = {"Prodigy": 1.0, "Lion8bit": 0.001}.get(name, 0.005)
    config = replace(config, optimizer=name, learning_rate=rate, steps=24, checkpoint_every=9, log_every=12)
    whole = train(config)
    losses = [
        json.loads(line)["loss"] for line in (whole.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert losses[-1] < losses[0]
    part = train_until(replace(config, out=config.out.parent / "b"), 9)
    resume(part.folder)
    file = "adapter/unet/adapter_model.safetensors"
    assert (whole.folder / file).read_bytes() == (part.folder / file).read_bytes()


def test_schedule_free_writes_its_average(config):
    """The adapter is what the optimizer means by its weights, not where it takes its gradients."""
    config = replace(config, optimizer="AdamWScheduleFree", steps=8)
    run = train(config)
    state = torch.load(run.checkpoint_files()[-1], weights_only=True)
    written = load_file(run.adapter / "unet" / WEIGHTS)
    kept = {tuple(p.shape): p for p in state["parameters"]}
    assert not any(torch.equal(value, kept[tuple(value.shape)]) for value in written.values())


def test_a_library_that_is_missing(config, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("prodigyopt", "bitsandbytes", "torchao") else real(name),
    )
    with pytest.raises(UserError, match=r"prodigyopt, which is not installed: pip install .rankfold\[optimizers\]"):
        train(replace(config, optimizer="Prodigy"))
    with pytest.raises(UserError, match=r"bitsandbytes, which is not installed: pip install .rankfold\[quantize\]"):
        train(replace(config, quantize="nf4"))
    with pytest.raises(UserError, match="torchao, which is not installed"):
        train(replace(config, quantize="fp8"))


@pytest.mark.parametrize("adapter", ["lora", "moslora", "glora", "loratrf"])
def test_lora_plus(config, adapter):
    """Up-factors have the higher rate, all else the plain one."""
    task = task_of(replace(config, adapter=adapter, lora_plus_ratio=8.0))
    rates = {}
    for group in task.parameter_groups():
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    named = {n: rates[id(p)] for n, p in task.training.model.unet.named_parameters() if p.requires_grad}
    ups = {n for n in named if "lora_B" in n or "_up." in n}
    assert ups
    assert {named[n] for n in ups} == {8 * config.learning_rate}
    assert {named[n] for n in set(named) - ups} == {config.learning_rate}


def test_an_fp8_layer_keeps_no_dequantised_weight():
    """Autograd holds the input at most; the gradient is that of the quantised weight."""
    layers = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), "fp8", torch.float32)
    x, kept = torch.randn(4, 64, generator=generator(0), requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda held: held
    ):
        y = layers(x)
    assert not {(64, 64), (32, 64), (64, 32)} & {tuple(shape) for shape in kept}
    (own,) = torch.autograd.grad(y.sum(), x)
    first, second = (layer.weight.dequantize() for layer in layers)
    torch.testing.assert_close(own, (second @ first).sum(0).expand(4, -1))


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantised_bases_train(config, kind):
    import bitsandbytes as bnb

    task = task_of(replace(config, quantize=kind, train_text_encoder=True))
    expected = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt, "fp8": FrozenLinear}[kind]
    for part in task.training.parts.values():
        assert all(isinstance(layer.get_base_layer(), expected) for layer in adapter_layers(part).values())
    run = train(replace(config, quantize=kind, steps=30, learning_rate=0.01, log_every=10))
    losses = [
        json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_previews_leave_a_quantised_base_as_it_is(config, kind):
    """bitsandbytes repacks 4 bit weights in eval mode on some CPUs, behind which nothing could be learned."""
    config = replace(config, quantize=kind, steps=4, log_every=1, preview_steps=1)
    runs = [train(replace(config, preview_every=every, out=config.out.parent / str(every))) for every in (0, 1)]
    assert [row["loss"] for row in runs[0].metrics()] == [row["loss"] for row in runs[1].metrics()]


# ---------------------------------------------------------------------------------------------- what is said before a run


def test_what_is_probably_not_meant_is_said(config, images, tmp_path, capsys):
    from PIL import Image

    from rankfold.training.launch.notices import notices, summarize

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64)).save(photos / "0.png")
    (photos / "1.psd").write_bytes(b"x")
    (photos / "0.txt").write_text("a photo of a brown dog")

    def said(config):
        return notices(config, summarize(config, (find_samples(photos), config.base)))

    wrong = replace(config, images=photos, optimizer="Prodigy", learning_rate=1e-3, text_learning_rate=None)
    rate, left_out, token = said(wrong)
    assert "expects --learning-rate 1" in rate
    assert "No caption says sks" in token
    assert "1.psd" in left_out
    (photos / "1.psd").unlink()
    (photos / "0.txt").write_text("a photo of a sks dog")
    right = replace(wrong, learning_rate=1.0)
    assert said(right) == []
    for name in ("masks", "more/deep"):
        (photos / name).mkdir(parents=True)
        Image.new("L", (64, 64), 255).save(photos / name / "0.png")
    (below,) = said(replace(right, masks=str(photos / "masks")))
    assert below == f"Not used, neither an image nor a caption of one: more/. ({photos})"


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"unmasked_weight": 0.5}, "--masks"),
        ({"prior_images": 5}, "--prior-weight"),
        ({"text_learning_rate": 0.5}, "--train-text-encoder or --num-vectors"),
        ({"text_target_modules": ("q_proj",)}, "--train-text-encoder"),
        ({"preview_every": 0, "preview_prompts": ("a dog",)}, "--preview-every"),
        ({"evaluate_prompts": "none"}, "--evaluate-every"),
    ],
)
def test_what_has_no_effect_is_said(given, needed):
    name = list(given)[-1].replace("_", "-")
    said = unused_settings(resolve_defaults(SubjectConfig(**given)))
    assert said == [f"--{name} has no effect: it goes with {needed}, which is not given."]
    assert unused_settings(resolve_defaults(SubjectConfig(text_learning_rate=0.5, train_text_encoder=True))) == []


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (ComposeConfig(weights=(1.0,), max_rank=4, tie="global"), "tie", "without --images nothing is learned"),
        (ComposeInstructConfig(temperature=2.0), "temperature", "without --data nothing is learned"),
        (ComposeConfig(images=Path("photos"), density=0.2), "density", "it goes with --merge, which is not given"),
        (InstructConfig(target_modules=("x",), target_parts=("projector",)), "target-parts", "--target-modules says all layers"),
        (InstructConfig(preview_every=0, preview_rows=2), "preview-rows", "it goes with --preview-every, which is not given"),
        (SubjectConfig(timestep_shift=3.0), "timestep-shift", "Stable Diffusion predicts noise, and its timesteps are drawn evenly"),
    ],
)  # fmt: skip
def test_what_has_no_effect_beside_the_method_is_said(config, name, why):
    assert unused_settings(resolve_defaults(config)) == [f"--{name} has no effect: {why}."]
    assert not unused_settings(resolve_defaults(SubjectConfig(base="tiny-dit", timestep_shift=3.0)))


def test_a_constant_rate_warms_up_too():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule, rates = make_schedule(SubjectConfig(lr_warmup_steps=4), optimizer), []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


def test_braces_of_a_prompt_are_braces(config):
    from rankfold.training.subject.prompts import preview_texts

    odd = replace(config, preview_prompts=("a {token} {noun} in {red|blue}", "a {", "{trigger}"))
    assert preview_texts(odd) == ["a sks creature in {red|blue}", "a {", "{trigger}"]
