"""Every mistake with an adapter's settings or files gets one sentence that says what to do."""

import pytest
import torch
from peft import get_peft_model
from test_adapter_contract import config, randomised, two_convolutions, two_linears

from rankfold import FvaeLoraConfig, GloraConfig, LoraTrfConfig, MosLoraConfig
from rankfold.toolkit.adapters.attach import adapter_state, attach, load_adapter_state
from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.errors import UserError

OURS = (MosLoraConfig, FvaeLoraConfig, LoraTrfConfig, GloraConfig)


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
        ({"dropout": 1.0}, "below 1"),
        ({"bias": "all"}, "must be 'none'"),
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
        (FvaeLoraConfig, {"encoder_dropout": 1.0}, "below 1"),
        (LoraTrfConfig, {"filter": "cosin"}, "cosine, code, edit, subspace"),
        (LoraTrfConfig, {"filter_r": 0}, "at least 1"),
        (LoraTrfConfig, {"filter_scale": 0.0}, "above 0"),
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
def test_a_rank_above_the_layer_is_refused(label):
    with pytest.raises(ValueError, match=r"larger than the layer 0 .6 to 8.: choose r of at most 6"):
        get_peft_model(two_linears(), config(label, rank=7))


@pytest.mark.parametrize("label", REGISTRY)
def test_files_that_do_not_fit(label):
    state = adapter_state(randomised(get_peft_model(two_linears(), config(label))))
    load_adapter_state(get_peft_model(two_linears(), config(label)), state)
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load_adapter_state(get_peft_model(two_linears(), config(label)), dict(list(state.items())[1:]))
    other = next(name for name in REGISTRY if name != label)
    with pytest.raises(UserError, match="no place for"):
        load_adapter_state(get_peft_model(two_linears(), config(other)), state)
    wider = {name: torch.zeros(*(2 * side for side in tensor.shape)) for name, tensor in state.items()}
    with pytest.raises(UserError, match="does not fit"):
        load_adapter_state(get_peft_model(two_linears(), config(label)), wider)


def test_attach_says_which_option(monkeypatch):
    model = two_convolutions()
    model.add_adapter = lambda settings, name: get_peft_model(model, settings, name)
    with pytest.raises(UserError, match=r"--target-modules: fvae cannot adapt a Conv2d layer.*Linear"):
        attach(model, config("fvae"))
