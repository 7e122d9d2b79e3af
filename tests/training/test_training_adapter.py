"""The training adapter: in the weights while training, out of them wherever images are drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from forked import run_in_two_processes
from PIL import Image
from safetensors.torch import load_file, save_file
from short_runs import adapter, equal_states, train_until, write_config

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.diffusion.load import open_model
from rankfold.toolkit.formats.apply import apply_to_pipeline
from rankfold.toolkit.formats.read import read_lora
from rankfold.training.launch.plan import plan
from rankfold.training.launch.start import preflight, resume, train
from rankfold.training.subject.training_adapter import merge_training_adapter


def changed_layers(unet):
    return [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "ff.net.2", "resnets.0.conv1"))]


@pytest.fixture(scope="module")
def undo(base, tmp_path_factory):
    """A file as kohya's tool writes it, which changes linear layers and convolutions."""
    unet, state = open_model(str(base)).unet, {}
    torch.manual_seed(7)
    for name in changed_layers(unet):
        weight = unet.get_submodule(name).weight
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = torch.randn(4, *weight.shape[1:]) * 0.2
        state[f"{key}.lora_up.weight"] = torch.randn(len(weight), 4, *([1, 1] if weight.dim() == 4 else [])) * 0.2
        state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, file := tmp_path_factory.mktemp("undo") / "undo.safetensors")
    return file


@pytest.fixture(scope="module")
def merged(base, undo, tmp_path_factory):
    """The base with that file in its weights, as a base of its own."""
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    apply_to_pipeline(read_lora(undo), pipe)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("merged"))
    return folder


def drawn(run):
    return [Image.open(path).tobytes() for path in sorted(run.samples.glob("*.png"))]


def test_trained_as_on_the_merged_base_and_drawn_as_without(config, merged, undo, tmp_path):
    """To the bit: what is learned is what a base with the file in its weights teaches, however often images are drawn in between."""
    config = replace(config, steps=4, preview_steps=2, preview_prompts=("a sks creature",))
    theirs = train(replace(config, base=str(merged), out=tmp_path / "theirs"))
    ours = train(replace(config, training_adapter=undo, preview_every=2, out=tmp_path / "ours"))
    plain = train(replace(config, out=tmp_path / "plain"))
    assert equal_states(adapter(theirs.folder), adapter(ours.folder))
    assert not equal_states(adapter(theirs.folder), adapter(plain.folder))
    recipe = Recipe(
        prompt="a sks creature",
        base=config.base,
        adapters=(str(ours.adapter),),
        strengths=(1.0,),
        steps=2,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
    )
    ((image, _),) = generate(recipe)
    ((other, _),) = generate(replace(recipe, base=str(merged)))
    preview = torch.frombuffer(bytearray(drawn(ours)[-1]), dtype=torch.uint8).int()
    differences = [
        (torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int() - preview).abs().max()
        for one in (image, other)
    ]
    assert differences[0] <= 1 < differences[1]  # adapters in the weights or beside them round differently
    facts = json.loads((ours.adapter / "rankfold.json").read_text())
    assert facts["training_adapter"].startswith("undo.safetensors (")


def test_resume_is_exact(config, undo, tmp_path):
    config = replace(config, training_adapter=undo)
    whole = train(replace(config, out=tmp_path / "whole"))
    part = train_until(replace(config, out=tmp_path / "part"), 3)
    resume(part.folder)
    assert equal_states(adapter(whole.folder), adapter(part.folder))


def test_two_processes(config, undo, tmp_path):
    """Each with the file in its base's weights, out of them for its share of the previews."""
    own = {"training_adapter": undo, "batch_size": 4, "log_every": 1, "preview_every": 3, "preview_steps": 2}
    config = replace(config, steps=3, preview_prompts=("a sks creature", "a sks creature in the snow"), **own)
    one = train(config)
    two = replace(config, out=tmp_path / "two")
    run_in_two_processes(tmp_path, ["train", "subject", "--config", str(write_config(two, tmp_path / "two.yaml"))])
    both = one, Run(two.out)
    assert both[1].status()["processes"] == 2
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    states = [torch.cat([tensor.flatten() for tensor in adapter(run.folder).values()]) for run in both]
    assert (states[0] - states[1]).norm() < 1e-3 * states[0].norm()
    shown = [torch.tensor([list(image) for image in drawn(run)]) for run in both]
    assert len(shown[0]) == 2
    assert (shown[0] - shown[1]).abs().max() <= 2


def test_another_file_under_its_name_is_another_run(config, undo, tmp_path):
    state = load_file(undo)
    save_file(state, file := tmp_path / "mine.safetensors")
    run = train_until(replace(config, training_adapter=file), 2)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file)
    with pytest.raises(UserError, match=r"mine\.safetensors"):
        resume(run.folder)


def test_only_what_has_an_effect_is_taken(config, undo, tmp_path):
    text = {f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{name}.weight": torch.ones(shape)
            for name, shape in (("down", (2, 128)), ("up", (128, 2)))}  # fmt: skip
    save_file(text, tmp_path / "text.safetensors")
    save_file(load_file(undo) | text, tmp_path / "both.safetensors")
    save_file(
        {k: v[:, :3].clone() if "lora_down" in k else v for k, v in load_file(undo).items()},
        tmp_path / "cut.safetensors",
    )
    for name, words in (
        ("text.safetensors", "changes text_encoder, and only changes of the unet are merged"),
        ("both.safetensors", "changes text_encoder, and only changes of the unet are merged"),
        ("cut.safetensors", "made for another base"),
        ("nowhere.safetensors", "--training-adapter: .*nowhere.safetensors does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            preflight(replace(config, training_adapter=tmp_path / name))
    given = [str(part) for part in (config.images, tmp_path / "text.safetensors", config.base, tmp_path / "run")]
    options = ("--images", "--training-adapter", "--base", "--out")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "subject", *(word for pair in zip(options, given, strict=True) for word in pair)])


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
def test_weights_change_places_to_the_bit(base, merged, undo, kind):
    """Also quantised ones: what is trained on is the merged base quantised, what is drawn with is the base quantised."""
    inputs = torch.randn(2, 24, 8, 8), torch.tensor([500, 20]), torch.randn(2, 24, 128)
    added = {"text_embeds": torch.randn(2, 128)}

    def outcome(unet):
        with torch.no_grad():
            return unet(*inputs, added_cond_kwargs=added).sample

    expected = [outcome(open_model(str(folder), quantize=kind).unet) for folder in (base, merged)]
    model = open_model(str(base), quantize=kind)
    weights = merge_training_adapter(model, undo)
    assert set(weights.waiting) == set(changed_layers(model.unet))
    for _ in range(2):
        assert torch.equal(outcome(model.unet), expected[1])
        with weights.in_place():
            assert torch.equal(outcome(model.unet), expected[0])


def test_a_plan_counts_the_layers_that_wait(config, base, undo):
    plans = [plan(replace(config, training_adapter=given)) for given in (None, undo)]
    unet = open_model(str(base)).unet
    layers = [unet.get_submodule(name) for name in changed_layers(unet)]
    assert plans[1].base - plans[0].base == sum(p.numel() * 4 for layer in layers for p in layer.parameters())
    assert plans[1].working == plans[0].working
