"""Training of a subject that goes on from another adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settings import quick_config

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.load import open_model
from rankfold.toolkit.formats import native
from rankfold.toolkit.formats.source import load_source
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.start import preflight, train
from rankfold.training.subject.adapter import SubjectAdapter

STATE = "adapter/unet/adapter_model.safetensors"


@pytest.fixture
def config(base, images, tmp_path):
    return quick_config(
        SubjectConfig,
        base=str(base),
        images=images,
        out=tmp_path / "more",
        adapter="lora",
        steps=1,
        batch_size=2,
        learning_rate=1e-12,  # the start shows in what is saved
        preservation_weight=0.0,
        preview_every=0,
        threads=1,
        rank=None,
        alpha=None,
    )


def kohya_file(tmp_path, base, ranks=(4, 6), alpha=2.0):
    """A file as kohya's tool writes it, of two layers of two ranks with one alpha."""
    unet, state = open_model(str(base)).unet, {}
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1.to_q")]
    for name, rank in zip(names, ranks, strict=False):
        out, fan_in = unet.get_submodule(name).weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = torch.randn(rank, fan_in)
        state[f"{key}.lora_up.weight"] = torch.randn(out, rank)
        state[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(state, file := tmp_path / "theirs.safetensors")
    return file


def deltas(path, base):
    model = open_model(str(base))
    parts = load_source(path, model).parts
    return {
        name: change.delta_weight(model.unet.get_submodule(name).weight.float())
        for name, change in parts["unet"].items()
    }


def test_a_file_of_another_tool_keeps_layers_ranks_and_alphas(config, base, tmp_path):
    file = kohya_file(tmp_path, base)
    config = replace(config, start_from=file)
    run = train(config)
    theirs, ours = deltas(file, base), deltas(run.folder, base)
    assert theirs.keys() == ours.keys()
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, rtol=1e-5, atol=1e-6)
    own = native.open_config(run.adapter / "unet")
    assert isinstance(own, LoraConfig)
    assert {own.r, *own.rank_pattern.values()} == {4, 6}
    assert {own.lora_alpha, *own.alpha_pattern.values()} == {2.0}
    with safe_open(file, "pt") as said:
        downs = {said.get_tensor(k).flatten()[0].item() for k in said.keys() if "lora_down" in k}  # noqa: SIM118
    kept = {v.flatten()[0].item() for k, v in load_file(run.folder / STATE).items() if "lora_A" in k}
    assert {round(value, 4) for value in downs} == {round(value, 4) for value in kept}


def test_it_is_trained(config, base, tmp_path):
    file = kohya_file(tmp_path, base)
    run = train(replace(config, start_from=file, learning_rate=0.05))
    theirs, ours = deltas(file, base), deltas(run.folder, base)
    assert all(not torch.allclose(ours[name], change, rtol=1e-3) for name, change in theirs.items())


@pytest.mark.parametrize("method", ["moslora", "loha"])
def test_a_run_of_the_same_method_goes_on_exactly(config, method, tmp_path):
    first = train(replace(config, adapter=method, rank=3, alpha=6.0, learning_rate=0.05, out=tmp_path / "first"))
    more = replace(config, adapter=method, start_from=first.folder)
    assert (resolve_defaults(more).rank, resolve_defaults(more).alpha) == (3, 6.0)
    run = train(more)
    before, after = load_file(first.folder / STATE), load_file(run.folder / STATE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "moslora"}, "is of the method lora: give --adapter lora"),
        ({"rank": 9}, "--rank 9: the adapter .* has 4, which is kept"),
        ({"alpha": 9.0}, "--alpha 9: the adapter .* has 2, which is kept"),
        ({"blocks": "down"}, "--blocks does not go with --start-from"),
        ({"target_modules": ("to_q",)}, "--target-modules does not go with --start-from"),
    ],
)
def test_settings_that_the_adapter_decides_are_refused(changes, words, config, base, tmp_path):
    with pytest.raises(UserError, match=words):
        preflight(replace(config, start_from=kohya_file(tmp_path, base, ranks=(4, 4)), **changes))


def test_what_cannot_be_trained_further_is_refused_before_a_model_is_loaded(config, base, tmp_path):
    state = load_file(kohya_file(tmp_path, base))
    with pytest.raises(UserError, match="nowhere does not exist"):
        preflight(replace(config, start_from=tmp_path / "nowhere"))
    save_file({f"x_{k}": v for k, v in state.items()}, strange := tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="made for another base model"):
        preflight(replace(config, start_from=strange))
    other = {k: torch.zeros(v.shape[0], 5) if "lora_down" in k else v for k, v in state.items()}
    save_file(other, fits_not := tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="made for another base model"):
        preflight(replace(config, start_from=fits_not))
    dora = state | {next(iter(state)).rpartition(".lora_")[0].removesuffix(".alpha") + ".dora_scale": torch.ones(32, 1)}
    save_file(dora, dora_file := tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match="plain LoRA"):
        preflight(replace(config, start_from=dora_file))
    text = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj." + k: v for k, v in text_layer(base).items()}
    save_file(state | text, both := tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="changes text_encoder too: give --train-text-encoder"):
        preflight(replace(config, start_from=both))
    _, (samples, _) = preflight(replace(config, start_from=both, train_text_encoder=True))
    assert samples


def text_layer(base):
    width = open_model(str(base)).text_encoder.config.hidden_size
    return {
        "lora_down.weight": torch.randn(4, width), "lora_up.weight": torch.randn(width, 4), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def test_a_plan_counts_its_layers(config, base, tmp_path):
    from rankfold.training.launch.plan import plan

    file = kohya_file(tmp_path, base)
    found = plan(replace(config, start_from=file))
    model = open_model(str(base), device="meta")
    parts = SubjectAdapter(resolve_defaults(replace(config, start_from=file))).attach(model)
    assert found.parameters == sum(p.numel() for p in parts["unet"].parameters() if p.requires_grad)
