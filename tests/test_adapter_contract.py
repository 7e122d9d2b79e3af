"""One test over the registry: what every variant promises, on Linear and Conv2d."""

import copy
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from rankfold.toolkit.adapters.attach import adapter_layers, adapter_state
from rankfold.toolkit.adapters.fold import fold, is_dead
from rankfold.toolkit.adapters.moslora import MosLoraConfig
from rankfold.toolkit.adapters.registry import adapter_names, make_config
from rankfold.toolkit.errors import UserError

REFERENCE = Path(os.environ.get("RANKFOLD_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
TARGETS = ("0", "1", "4")


class Net(nn.Sequential):
    """Two convolutions and a linear layer."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )


def config(name, **changes):
    return make_config(name, **({"rank": 3, "alpha": 6.0, "dropout": 0.0, "target_modules": TARGETS} | changes))


def randomised(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", adapter_names())
class TestContract:
    def test_starts_as_the_base_model(self, name, net, x):
        expected = net(x)
        model = get_peft_model(net, config(name))
        assert torch.equal(model(x), expected)
        assert is_dead(model)

    def test_trains(self, name, net, x):
        model = get_peft_model(net, config(name))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not is_dead(model)
        before = adapter_state(model)
        model(x).square().sum().backward()
        optimizer.step()
        moved = [key for key, value in adapter_state(model).items() if not torch.equal(value, before[key])]
        assert moved == list(before)

    def test_merge_is_forward_and_unmerge_is_exact(self, name, net, x):
        model = randomised(get_peft_model(net, config(name))).eval()
        expected = model(x)
        weights = [layer.get_base_layer().weight.clone() for layer in adapter_layers(model).values()]
        model.merge_adapter(safe_merge=True)
        assert not torch.equal(weights[0], next(iter(adapter_layers(model).values())).get_base_layer().weight)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        for layer, weight in zip(adapter_layers(model).values(), weights, strict=True):
            if name == "lora":  # PEFT subtracts again, which rounds
                torch.testing.assert_close(layer.get_base_layer().weight, weight)
            else:
                assert torch.equal(layer.get_base_layer().weight, weight)

    def test_saves_and_loads(self, name, net, x, tmp_path):
        base = copy.deepcopy(net)
        model = randomised(get_peft_model(net, config(name))).eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(x), model(x))

    def test_merge_and_unload_leaves_a_plain_model(self, name, net, x):
        model = randomised(get_peft_model(net, config(name))).eval()
        expected = model(x)
        plain = model.merge_and_unload()
        assert type(plain) is Net
        assert not adapter_layers(plain)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)

    def test_fold_is_the_change(self, name, net, x):
        base = copy.deepcopy(net)
        model = randomised(get_peft_model(net, config(name))).eval()
        modules = dict(base.named_modules())
        for layer, (down, up) in fold(model).items():
            weight = modules[layer.removeprefix("base_model.model.")].weight
            weight.data += (up @ down).view(weight.shape)
        torch.testing.assert_close(base(x), model(x), rtol=1e-4, atol=1e-4)

    def test_strength_scales_the_change(self, name, net, x):
        net = nn.Sequential(nn.Linear(6, 4))
        x = torch.randn(5, 6)
        plain = net(x)
        model = randomised(get_peft_model(net, config(name, target_modules=("0",)))).eval()
        change = model(x) - plain
        for layer in adapter_layers(model).values():
            layer.set_scale("default", 0.25)
        torch.testing.assert_close(model(x) - plain, 0.25 * change)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)

    def test_two_adapters_add_up(self, name, net, x):
        net = nn.Sequential(nn.Linear(6, 4))
        x = torch.randn(5, 6)
        plain = net(x)
        model = get_peft_model(net, config(name, target_modules=("0",)), adapter_name="one")
        model.add_adapter("two", config(name, target_modules=("0",), rank=2))
        changes = []
        for seed, adapter in enumerate(("one", "two")):
            model.set_adapter(adapter)
            randomised(model, seed)
            changes.append(model(x) - plain)
        model.base_model.set_adapter(["one", "two"])
        torch.testing.assert_close(model(x) - plain, changes[0] + changes[1])
        model.delete_adapter("one")
        model.set_adapter("two")
        torch.testing.assert_close(model(x) - plain, changes[1])

    def test_dropout_only_in_training(self, name, net, x):
        model = randomised(get_peft_model(net, config(name, dropout=0.5)))
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))

    def test_base_in_half_precision(self, name):
        net = nn.Sequential(nn.Linear(6, 4)).bfloat16()
        model = randomised(get_peft_model(net, config(name, target_modules=("0",))))
        out = model(torch.randn(2, 6).bfloat16())
        assert out.dtype == torch.bfloat16

    def test_on_a_diffusers_unet(self, name):
        from rankfold.toolkit.models.tiny import make_unet

        unet = make_unet()
        unet.add_adapter(config(name, target_modules=("to_q", "to_k", "to_v", "to_out.0")), "subject")
        unet.set_adapters(["subject"], [0.5])
        unet.disable_adapters()
        unet.enable_adapters()
        unet.fuse_lora()
        unet.unfuse_lora()
        unet.unload_lora()
        assert not adapter_layers(unet)


def test_moslora_matches_the_released_code():
    with safe_open(REFERENCE / "moslora.safetensors", "pt") as file:
        known = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    r = known["down"].shape[0]
    layer = nn.Linear(known["weight"].shape[1], known["weight"].shape[0], bias="bias" in known).double()
    layer.weight.data = known["weight"]
    if "bias" in known:
        layer.bias.data = known["bias"]
    model = get_peft_model(nn.Sequential(layer), MosLoraConfig(r=r, alpha=float(known["alpha"]), target_modules=["0"]))
    adapted = next(iter(adapter_layers(model).values()))
    for tensor in ("down", "mixer", "up"):
        adapted.tensors("default")[tensor].data = known[tensor]
    torch.testing.assert_close(model(known["x"]), known["y"], rtol=1e-10, atol=1e-10)
    delta = adapted.get_delta_weight("default").double()
    torch.testing.assert_close(delta, known["delta_weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", ["frozen", "identity"])
def test_moslora_frozen_mixer_stays(mixer):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), MosLoraConfig(r=3, mixer=mixer, target_modules=["0"]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2
    assert not any("mixer" in name for name in names)
    layer = next(iter(adapter_layers(model).values()))
    mixer_weight = layer.tensors("default")["mixer"]
    torch.testing.assert_close(mixer_weight @ mixer_weight.T, torch.eye(3))
    assert torch.equal(mixer_weight, torch.eye(3)) == (mixer == "identity")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": -1.0}, "alpha"),
        ({"mixer_init": "zero"}, "never trains"),
    ],
)
def test_config_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        MosLoraConfig(target_modules=["0"], **changes)


def test_unknown_adapter_names_the_nearest():
    with pytest.raises(UserError, match="moslora"):
        config("mosslora")
    with pytest.raises(UserError, match="mixer"):
        config("moslora", options={"mixr": "frozen"})


def test_stock_peft_refuses_the_file(tmp_path):
    """Without rankfold, PEFT must say that it does not know the adapter, not load half of it."""
    import subprocess
    import sys

    get_peft_model(Net(), config("moslora")).save_pretrained(tmp_path)
    code = (
        "from peft import PeftModel; from torch import nn;"
        f"PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), {str(tmp_path)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "MOSLORA" in result.stderr
