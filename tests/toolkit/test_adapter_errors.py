"""Every mistake with an adapter's settings or files gets one sentence that says what to do."""

import pytest
import torch
from adapters import config, randomize, two_convolutions, two_linears
from peft import get_peft_model

from rankfold import DeftConfig, FvaeLoraConfig, GloraConfig, LoraTrfConfig, MosLoraConfig, TLoraConfig
from rankfold.toolkit.adapters.attach import adapter_state, attach, load_adapter_state
from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.core.errors import UserError

OURS = (MosLoraConfig, FvaeLoraConfig, LoraTrfConfig, GloraConfig, TLoraConfig, DeftConfig)


def test_all_configs_are_here():
    assert {layer.config_class for layer in REGISTRY.values()} == set(OURS)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "at least 1"),
        ({"r": 2.5}, "whole number"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern"),
        ({"alpha": 0.0}, "above 0"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"bias": "some"}, "bias must be one of none, all, [a-z_]+_only, not 'some'"),
    ],
)
def test_shared_fields(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        kind(target_modules=["0"], **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (MosLoraConfig, {"mixer": "none"}, "learned, frozen, identity"),
        (MosLoraConfig, {"mixer_init": "zero"}, "never trains"),
        (FvaeLoraConfig, {"z1": 4.0}, "no lower bound"),
        (FvaeLoraConfig, {"kl": 0.0}, "no lower bound"),
        (FvaeLoraConfig, {"z1": 1.0, "rank_pattern": {"to_q": 2}}, "no lower bound"),
        (FvaeLoraConfig, {"fusion": "sum"}, "concat, average"),
        (FvaeLoraConfig, {"decoder_layers": 0}, "at least 1"),
        (FvaeLoraConfig, {"encoder_dropout": 1.0}, r"in \[0, 1\)"),
        (LoraTrfConfig, {"filter": "cosin"}, "cosine, code, edit, subspace"),
        (LoraTrfConfig, {"filter_r": 0}, "at least 1"),
        (LoraTrfConfig, {"filter_scale": 0.0}, "above 0"),
        (TLoraConfig, {"init": "svd"}, "orthogonal, lora"),
        (TLoraConfig, {"min_share": 0.0}, "above 0 and at most 1"),
        (TLoraConfig, {"min_share": 1.5}, "above 0 and at most 1"),
        (DeftConfig, {"form": "svd"}, "relu, qr"),
        (DeftConfig, {"keep_unmerged": False}, "must stay on"),
        (GloraConfig, {"a": "matrix"}, "lora, vector, constant, none"),
        (GloraConfig, {"structure": {"to_q": "lora,none"}}, "five choices"),
        (GloraConfig, {"structure": {"to_q": "lora,lora,lora,lora,lora"}}, "five choices"),
        (GloraConfig, {"dropout": 0.1}, "no input of its own"),
        (GloraConfig, {"a_rate": 0.0}, "above 0"),
        (GloraConfig, {"keep_unmerged": False}, "must stay on"),
    ],
)
def test_own_fields(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        kind(target_modules=["0"], **changes)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="moslora"):
        config("mosslora")
    with pytest.raises(UserError, match="mixer"):
        config("moslora", options={"mixr": "frozen"})
    with pytest.raises(UserError, match="filter_r"):
        config("loratrf", options={"filter_r": "many"})


@pytest.mark.parametrize("label", REGISTRY)
def test_files_that_do_not_fit(label):
    state = adapter_state(randomize(get_peft_model(two_linears(), config(label))))
    load_adapter_state(get_peft_model(two_linears(), config(label)), state)
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load_adapter_state(get_peft_model(two_linears(), config(label)), dict(list(state.items())[1:]))
    other = next(name for name in REGISTRY if name != label)
    with pytest.raises(UserError, match="no place for"):
        load_adapter_state(get_peft_model(two_linears(), config(other)), state)
    wider = {name: torch.zeros(*(2 * side for side in tensor.shape)) for name, tensor in state.items()}
    with pytest.raises(UserError, match="does not fit"):
        load_adapter_state(get_peft_model(two_linears(), config(label)), wider)


def test_attach_says_which_option():
    with pytest.raises(UserError, match=r"--target-modules: fvae cannot adapt a Conv2d layer.*Linear"):
        attach(two_convolutions(), config("fvae"))


def test_attach_needs_no_integration_of_other_libraries(monkeypatch):
    """A release of diffusers or transformers that asks for a PEFT that is not out yet does not stop a training."""
    from diffusers.loaders import peft as images
    from transformers.integrations import peft as language

    from rankfold.toolkit.adapters.attach import adapter_layers, disable_adapters, remove_adapters, set_active
    from rankfold.toolkit.embedded import tiny_sd as tiny

    for library in (images, language):
        monkeypatch.setattr(library, "MIN_PEFT_VERSION", "99.0")
    for model in (tiny.make_unet(), tiny.make_text_encoder(tiny.make_tokenizer())):
        with pytest.raises((ValueError, ImportError), match=r"99\.0"):
            model.add_adapter(config("moslora"))
        frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attach(model, config("moslora", target_modules=("to_q", "q_proj")))
        attach(model, config("glora", target_modules=("to_q", "q_proj")), "other")
        with pytest.raises(UserError, match="an adapter 'other' already"):
            attach(model, config("glora", target_modules=("to_q", "q_proj")), "other")
        layers = list(adapter_layers(model).values())
        assert layers
        set_active(model, ["default"])
        assert all(layer.active_adapters == ["default"] and not layer.disable_adapters for layer in layers)
        set_active(model, [])
        assert all(layer.disable_adapters for layer in layers)
        assert not any(p.requires_grad for p in model.parameters())
        set_active(model, ["other", "default"])
        with disable_adapters(model):
            assert all(layer.disable_adapters for layer in layers)
        assert all(layer.active_adapters == ["other", "default"] for layer in layers)
        remove_adapters(model)
        after = model.state_dict()
        assert after.keys() == frozen.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
