"""What PEFT asks of its own methods, asked of every variant: the rules that a trainer, a hub or another library counts on.

Forward, merge and fold are in test_adapter_contract.py; here is what lies around them.
"""

import copy
import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from adapters import NOT_LINEAR, VARIANTS
from peft import (
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import check_hotswap_configs_compatible
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfold.toolkit.adapters.attach import adapter_layers, adapter_state, load_adapter_state
from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.adapters.fold import fold
from rankfold.toolkit.core.errors import UserError

SETTINGS = {label: (REGISTRY[name].config_class, options) for label, (name, options) in VARIANTS.items()}
LINEAR = [label for label in SETTINGS if label not in NOT_LINEAR]
every = pytest.mark.parametrize("label", SETTINGS)


def config(label, targets=("first", "last"), **changes):
    kind, options = SETTINGS[label]
    return kind(target_modules=list(targets), **({"r": 3, "init_weights": False} | options | changes))


class Net(nn.Module):
    """Two layers to adapt, and one that is trained in full."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.last(self.first(x).relu()).relu())


def adapted(label, *args, base=None, seed=1, **changes):
    base = Net() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, config(label, *args, **changes)).eval()


def inputs(dtype=torch.float32):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def differ(*outputs):
    return all(not torch.allclose(a, b, atol=1e-6) for n, a in enumerate(outputs) for b in outputs[:n])


@every
class TestConfig:
    def test_its_type_answers_as_a_member_of_peft_type_does(self, label):
        kind = config(label).peft_type
        assert (kind.value, kind.name, kind) == (SETTINGS[label][0].kind,) * 3
        assert type(kind.value) is str
        assert str(kind).partition(".")[2] == kind.value  # as model statuses take it apart
        assert kind not in list(PeftType)
        assert pickle.loads(pickle.dumps(kind)) == kind
        assert json.loads(json.dumps({"peft_type": kind})) == {"peft_type": kind.value}

    def test_a_file_holds_the_plain_type_and_reads_back(self, label, tmp_path):
        known = config(label)
        known.save_pretrained(tmp_path)
        text = json.loads((tmp_path / "adapter_config.json").read_text())
        assert text["peft_type"] == SETTINGS[label][0].kind
        again = type(known).from_pretrained(tmp_path)
        assert again.peft_type.value == text["peft_type"]
        assert again.init_weights is False

    def test_a_file_of_before_has_no_start_and_gets_the_usual_one(self, label, tmp_path):
        known = config(label)
        known.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        values = json.loads(path.read_text())
        del values["init_weights"]
        path.write_text(json.dumps(values))
        assert type(known).from_pretrained(tmp_path).init_weights is True


@every
class TestStart:
    def test_a_random_start_is_away_from_the_base_model(self, label):
        x = inputs()
        base, first, second = Net()(x), adapted(label, seed=1)(x), adapted(label, seed=2)(x)
        assert differ(base, first, second)
        assert torch.equal(first, adapted(label, seed=1)(x))
        assert torch.equal(adapted(label, init_weights=True)(x), base)

    def test_a_random_start_draws_nothing_for_the_usual_one(self, label):
        """Seeded runs go on as they were: only what is zero by the usual start is drawn, and only when asked for."""
        states = []
        for init_weights in (True, False):
            adapted(label, init_weights=init_weights)
            states.append(torch.get_rng_state())
        assert not torch.equal(*states)


@every
class TestLayer:
    def test_its_sides_are_the_base_layers(self, label):
        first, last = adapter_layers(adapted(label)).values()
        assert (first.in_features, first.out_features) == (6, 8)
        assert (last.in_features, last.out_features) == (8, 5)
        assert first.weight is first.get_base_layer().weight
        assert first.bias is first.get_base_layer().bias

    def test_a_rank_above_the_layer_is_taken_with_a_warning(self, label):
        with pytest.warns(UserWarning, match=r"rank 7 is larger than the layer \S*first .6 to 8.: r of at most 6"):
            model = adapted(label, ["first"], r=7)
        assert differ(model(inputs()), Net()(inputs()))
        if label in LINEAR:
            expected = model(inputs())
            model.merge_adapter()
            torch.testing.assert_close(model(inputs()), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("autocast", [True, False])
    def test_numbers_of_a_half_precision_base(self, label, dtype, autocast, tmp_path):
        """The adapter is in fp32 unless that is switched off, and either way it runs without autocast, merged or not."""
        torch.manual_seed(1)
        model = get_peft_model(Net().to(dtype), config(label), autocast_adapter_dtype=autocast)
        model.add_adapter("other", config(label), autocast_adapter_dtype=autocast)
        model.save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(Net().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
        read.load_adapter(tmp_path / "other", "other", autocast_adapter_dtype=autocast, low_cpu_mem_usage=True)
        for one in (model.eval(), read.eval()):
            tensors = [
                t for layer in adapter_layers(one).values() for name in layer.r for t in layer.tensors(name).values()
            ]
            assert {t.dtype for t in tensors} == {torch.float32 if autocast else dtype}
            out = one(inputs(dtype))
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
        assert torch.equal(model(inputs(dtype)), read(inputs(dtype)))
        if label in LINEAR:
            for safe in (False, True):
                model.merge_adapter(safe_merge=safe)
                torch.testing.assert_close(model(inputs(dtype)), out, atol=2e-2, rtol=2e-2)
                model.unmerge_adapter()
            assert torch.equal(model(inputs(dtype)), out)


@every
class TestFiles:
    def test_a_folder_has_all_that_a_hub_asks_for(self, label, tmp_path):
        model = adapted(label)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        facts = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
        assert facts["library_name"] == "peft"

    def test_what_was_trained_is_in_the_folder(self, label, tmp_path):
        """Every tensor of the model's state comes back, whether the adapter is loaded to be used or to be trained on."""
        model = adapted(label, ["first"], modules_to_save=["head"]).train()
        model.save_pretrained(tmp_path / "deep", selected_adapters=["default"])
        for trainable in (False, True):
            torch.manual_seed(9)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")
                read = PeftModel.from_pretrained(Net(), tmp_path, subfolder="deep", is_trainable=trainable)
            known, found = model.state_dict(), read.state_dict()
            assert known.keys() == found.keys()
            assert all(torch.equal(known[name], found[name]) for name in known)

    def test_a_run_keeps_what_the_adapter_needs_in_use(self, label, tmp_path):
        """rankfold's own files leave out what only training needs; both kinds of file are read."""
        model = adapted(label)
        small, whole = adapter_state(model), get_peft_model_state_dict(model)
        extra = any(layer.training_only for layer in adapter_layers(model).values())
        assert (len(small) < len(whole)) == extra
        for state in (small, {key: value.clone() for key, value in whole.items()}):
            other = adapted(label, seed=5, inference_mode=True)
            load_adapter_state(other, state)
            assert torch.equal(other(inputs()), model(inputs()))

    def test_one_adapter_of_several(self, label, tmp_path):
        model = adapted(label)
        expected = {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(model)}
        for name in ("default2", "other_default", "foodefault_bar", "efaul"):
            model.add_adapter(name, config(label))
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        found = load_file(tmp_path / "adapter_model.safetensors")
        assert {name.removeprefix("base_model.model.") for name in found} == expected

    def test_little_memory_while_loading(self, label, tmp_path):
        model = adapted(label)
        model.save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True).eval()
        result = read.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
        assert not result.missing_keys
        assert {p.device.type for p in read.parameters()} == {"cpu"}
        assert torch.equal(read(inputs()), model(inputs()))
        bare = inject_adapter_in_model(config(label), Net(), low_cpu_mem_usage=True)
        assert "meta" in {p.device.type for p in bare.parameters()}

    def test_layers_put_into_a_model_without_a_wrapper(self, label):
        torch.manual_seed(1)
        model = inject_adapter_in_model(config(label), Net()).eval()
        state = get_peft_model_state_dict(model)
        torch.manual_seed(2)
        other = inject_adapter_in_model(config(label), Net()).eval()
        assert not set_peft_model_state_dict(other, state).unexpected_keys
        assert torch.equal(other(inputs()), model(inputs()))


@pytest.fixture(scope="module")
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every
@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_state_of_a_model_in_shards(label, bias, one_process):
    """The state dict of a model under FSDP names what one without it loads."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    kind = SETTINGS[label][0].kind.lower()
    bias = f"{kind}_only" if bias == "only" else bias
    model = adapted(label, bias=bias)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            if bias != "none":
                layer.bias.fill_(1.23)
    expected = model(inputs())
    state = get_peft_model_state_dict(
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    )
    other = adapted(label, seed=5, bias=bias)
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    torch.testing.assert_close(other(inputs()), expected)


@every
class TestSwitching:
    def test_which_parameters_learn(self, label):
        model = adapted(label, ["first"])
        model.add_adapter("other", config(label, modules_to_save=["head"]))

        def learning():
            frozen = {
                name for layer in adapter_layers(model).values() for name in layer.frozen_peft_weight_names["other"]
            }
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            assert not any(part in frozen for name in names for part in name.split("."))
            return {"other" if ".other" in name else "default" if ".default" in name else name for name in names}

        assert learning() == {"default"}
        model.set_adapter("other")
        assert learning() == {"other"}
        model.set_requires_grad("other", requires_grad=False)
        assert learning() == set()
        model.set_requires_grad(["default", "other"])
        assert learning() == {"default", "other"}

    @pytest.mark.parametrize("trainable", [True, False])
    def test_loading_does_not_change_who_learns(self, label, trainable, tmp_path):
        adapted(label).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)
        before = {name for name, p in model.named_parameters() if p.requires_grad}
        assert bool(before) == trainable
        model.load_adapter(tmp_path, "other", is_trainable=False)
        model.add_adapter("third", config(label))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == before

    def test_adapters_come_and_go(self, label):
        model = adapted(label)
        model.add_adapter("other", config(label, ["first"]))
        outputs = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            assert (model.active_adapter, model.active_adapters) == (name, [name])
            outputs[name] = model(inputs())
        assert differ(*outputs.values(), Net()(inputs()))
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("other", config(label))
        with pytest.raises(ValueError, match="unknown does not exist"):
            model.delete_adapter("unknown")
        model.delete_adapter("other")
        assert model.active_adapters == ["default"]
        assert torch.equal(model(inputs()), outputs["default"])
        for layer in adapter_layers(model).values():
            parts = [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
            assert not any("other" in part for part in [*parts, layer.frozen_peft_weight_names])

    def test_off_and_on_and_off_again(self, label):
        model = adapted(label)
        expected, plain = model(inputs()), Net()(inputs())
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(model(inputs()), plain)
            assert torch.equal(model(inputs()), plain)
        assert torch.equal(model(inputs()), expected)
        unloaded = model.unload()
        assert not adapter_layers(unloaded)
        assert torch.equal(unloaded(inputs()), plain)

    def test_states_that_can_be_asked_for(self, label):
        model = adapted(label)
        kind = SETTINGS[label][0].kind
        assert [status.name for status in get_layer_status(model)] == ["model.first", "model.last"]
        status = get_model_status(model)
        assert status.peft_types == {"default": kind}
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.num_adapter_layers == 2

    def test_what_is_not_offered_is_refused(self, label):
        model = adapted(label)
        with pytest.raises(ValueError, match="each row"):
            model(inputs(), adapter_names=["default"] * 4)
        with pytest.raises(AttributeError, match="add_weighted_adapter"):
            model.add_weighted_adapter(["default"], [1.0], "sum")
        with pytest.raises(ValueError, match=SETTINGS[label][0].kind):
            check_hotswap_configs_compatible(config(label), config(label))
        with pytest.raises(ValueError, match=SETTINGS[label][0].kind):
            get_peft_model(Net(), config(label), mixed=True)


@every
class TestBiases:
    def test_of_all_layers_or_of_the_adapted_ones(self, label, tmp_path):
        kind = SETTINGS[label][0].kind.lower()
        biases = {"all": {"first", "last", "head"}, f"{kind}_only": {"first"}}
        for bias, layers in biases.items():
            model = adapted(label, ["first"], bias=bias).train()
            learning = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
            assert {name.split(".")[2] for name in learning} == layers
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(inputs()).square().sum().backward()
            assert all(model.get_parameter(name).grad.any() for name in learning)
            with torch.no_grad():
                for name in learning:
                    model.get_parameter(name).fill_(0.7)
            model.eval().save_pretrained(tmp_path / bias)
            assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / bias).eval()(inputs()), model(inputs()))

    def test_one_adapter_has_them_and_no_other(self, label):
        model = adapted(label, bias="all")
        with pytest.raises(ValueError, match="only 1 adapter with bias"):
            model.add_adapter("other", replace(config(label), bias="all", r=4))
        assert list(model.peft_config) == ["default"]
        with pytest.warns(UserWarning, match="bias configured to be 'all'"), model.disable_adapter():
            pass

    def test_no_file_of_another_form_loses_them(self, label):
        model = adapted(label, bias="all")
        with pytest.raises(UserError, match="bias='all'" if label in LINEAR else "bias='all'|cannot be merged"):
            fold(model)


@pytest.mark.parametrize("label", LINEAR)
class TestMerging:
    def test_twice_is_once(self, label):
        model = adapted(label)
        model.merge_adapter()
        expected = model(inputs())
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            model.merge_adapter()
        assert torch.equal(model(inputs()), expected)
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    def test_of_chosen_adapters(self, label):
        model = adapted(label)
        model.add_adapter("other", config(label))
        model.base_model.set_adapter(["default", "other"])
        both = model(inputs())
        model.set_adapter("other")
        alone = model(inputs())
        model.merge_adapter(["default", "other"])
        torch.testing.assert_close(model(inputs()), both)
        model.unmerge_adapter()
        merged = model.merge_and_unload(adapter_names=["other"])
        torch.testing.assert_close(merged(inputs()), alone)
        torch.testing.assert_close(pickle.loads(pickle.dumps(merged))(inputs()), alone)

    def test_numbers_that_are_none_stay_out(self, label):
        model = adapted(label)
        before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
        for layer in adapter_layers(model).values():
            next(iter(layer.tensors("default").values())).data.fill_(float("inf"))
        with pytest.raises(
            ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
        ):
            model.merge_and_unload(safe_merge=True)
        assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


ON_CONVOLUTIONS = [label for label in LINEAR if nn.Conv3d in REGISTRY[label.partition("-")[0]].supported_layers]
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (1, 3), bias=False), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2, dilation=2), (2, 3, 4, 4, 4)),
    "transposed": (
        lambda: Conv1D(6, 3),
        (2, 4, 3),
    ),  # transformers' name for a linear layer with its weight as (in, out)
}


@every
@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers(label, kind, tmp_path):
    """Convolutions of any dimension, and GPT-2's linear layers, wherever the variant is at home."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    net = nn.ModuleDict({"first": make()})
    if kind != "transposed" and label not in ON_CONVOLUTIONS:
        with pytest.raises(ValueError, match=f"cannot adapt a {type(net['first']).__name__}"):
            adapted(label, ["first"], base=net)
        return
    x, kept = torch.randn(shape), copy.deepcopy(net)
    model = adapted(label, ["first"], base=net)
    layer = model.base_model.model["first"]
    assert (layer.in_features, layer.out_features) == (3, 6)
    out = layer(x)
    assert differ(out, kept["first"](x))
    out.square().sum().backward()
    assert layer.tensors("default")["up" if "up" in layer.attributes else "b_up"].grad.any()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(copy.deepcopy(kept), tmp_path).eval().base_model.model["first"](x), out
    )
    if label in LINEAR:
        change = layer.get_delta_weight("default")
        assert change.shape == kept["first"].weight.shape
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(layer.weight, kept["first"].weight + change)
        torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, kept["first"].weight)
        merged = model.merge_and_unload()["first"]
        assert merged.weight.is_contiguous()
        torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", NOT_LINEAR)
def test_what_cannot_merge_says_it_as_peft_does(label):
    model = adapted(label)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            call()
    for layer in adapter_layers(model).values():
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            layer.get_delta_weight("default")
    assert not model.supports_lora_conversion()


def test_a_change_of_the_bias_is_not_lost_in_a_conversion():
    """PEFT's conversion to LoRA takes over weights only."""
    assert adapted("moslora").supports_lora_conversion()
    assert adapted("glora", c="none", d="none", e="none").supports_lora_conversion()
    assert not adapted("glora").supports_lora_conversion()
