"""One test over the registry: what every variant promises, in stock PEFT, diffusers and transformers.

A new variant is tested by existing. EXTRA lists other settings of variants that behave differently from the default ones.
"""

import copy
import subprocess
import sys

import pytest
import torch
from adapters import NOT_LINEAR, VARIANTS, config, noise, randomize, two_convolutions, two_linears
from peft import PeftModel, get_peft_model
from torch import nn

from rankfold.toolkit.adapters.attach import adapter_layers, adapter_state
from rankfold.toolkit.adapters.auxiliary import auxiliary_losses
from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.adapters.fold import base_weight, fold, is_dead
from rankfold.toolkit.adapters.registry import adapter_names
from rankfold.toolkit.core.errors import UserError

ON_CONVOLUTIONS = [label for label, (name, _) in VARIANTS.items() if nn.Conv2d in REGISTRY[name].supported_layers]
MERGEABLE = [label for label in VARIANTS if label not in NOT_LINEAR]


def delta_weights(model):
    layers = adapter_layers(model)
    return {name: change.delta_weight(base_weight(layers[name]).float()) for name, change in fold(model).items()}


def weights_of(model):
    layers = [layer.get_base_layer() for layer in adapter_layers(model).values()]
    return [(layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in layers]


def equal(left, right):
    return all(
        torch.equal(a[0], b[0]) and (a[1] is b[1] or torch.equal(a[1], b[1])) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("label", VARIANTS)
class TestEveryVariant:
    def test_starts_as_the_base_model(self, label):
        net, x = two_linears(), noise(3, 6)
        expected = net(x)
        model = get_peft_model(net, config(label)).eval()
        assert torch.equal(model(x), expected)
        assert is_dead(model)

    def test_trains_every_tensor(self, label):
        model = get_peft_model(two_linears(), config(label))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        x = noise(64, 6)
        for _ in range(6):
            with auxiliary_losses() as auxiliary:
                loss = (model(x) - 1).square().mean()
            (loss + auxiliary.total()).backward()
            optimizer.step()
            optimizer.zero_grad()
        still = [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
        assert not still
        assert not is_dead(model.eval())

    @pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 3, 2, 6)])
    def test_any_input_rank(self, label, shape):
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        x = noise(*shape)
        flat = model(x.reshape(-1, 6)).reshape(*shape[:-1], 5)
        torch.testing.assert_close(model(x), flat)

    def test_saves_and_loads(self, label, tmp_path):
        base, x = two_linears(), noise(3, 6)
        model = randomize(get_peft_model(copy.deepcopy(base), config(label))).eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(x), model(x))
        again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        with auxiliary_losses() as auxiliary:
            (again(x).square().mean() + 0).backward()
        assert auxiliary is not None

    def test_strength_scales_the_change(self, label):
        net, x = two_linears()[:1], noise(5, 6)
        plain = net(x)
        model = randomize(get_peft_model(net, config(label, target_modules=("0",)))).eval()
        change = model(x) - plain
        assert change.abs().max() > 1e-3
        for layer in adapter_layers(model).values():
            layer.set_scale("default", 0.25)
        torch.testing.assert_close(model(x) - plain, 0.25 * change)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)

    def test_adapters_add_up_and_go(self, label):
        net, x = two_linears()[:1], noise(5, 6)
        plain = net(x)
        model = get_peft_model(net, config(label, target_modules=("0",)), adapter_name="one").eval()
        model.add_adapter("two", config(label, target_modules=("0",)))
        changes = []
        for seed, adapter in enumerate(("one", "two")):
            model.set_adapter(adapter)
            randomize(model, seed)
            changes.append(model(x) - plain)
        model.base_model.set_adapter(["one", "two"])
        torch.testing.assert_close(model(x) - plain, changes[0] + changes[1])
        model.delete_adapter("one")
        model.set_adapter("two")
        torch.testing.assert_close(model(x) - plain, changes[1])

    def test_half_precision_base(self, label):
        for dtype in (torch.bfloat16, torch.float16):
            x = noise(4, 6)
            model = randomize(get_peft_model(two_linears(), config(label))).eval()
            expected = model(x)
            half = get_peft_model(two_linears().to(dtype), config(label)).eval()
            half.load_state_dict({k: v.to(half.state_dict()[k].dtype) for k, v in model.state_dict().items()})
            assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
            out = half(x.to(dtype))
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)

    def test_rank_and_target_patterns(self, label):
        changed = config(label)
        changed.rank_pattern, changed.alpha_pattern = {"2": 5}, {"2": 20.0}
        model = get_peft_model(two_linears(), changed)
        first, second = adapter_layers(model).values()
        assert (first.r["default"], second.r["default"]) == (4, 5)
        assert (first.alpha["default"], second.alpha["default"]) == (6.0, 20.0)
        only = get_peft_model(two_linears(), config(label, target_modules=(r"2",)))
        assert [name.split(".")[-1] for name in adapter_layers(only)] == ["2"]

    def test_modules_to_save(self, label, tmp_path):
        changed = config(label, target_modules=("0",))
        changed.modules_to_save = ["2"]
        base, x = two_linears(), noise(3, 6)
        model = randomize(get_peft_model(copy.deepcopy(base), changed)).eval()
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x))

    def test_gradient_checkpointing_gives_the_same_gradients(self, label):
        from torch.utils.checkpoint import checkpoint

        gradients = []
        for run in (lambda net, x: net(x), lambda net, x: checkpoint(net, x, use_reentrant=False)):
            model = randomize(get_peft_model(two_linears(), config(label)))
            torch.manual_seed(5)
            with auxiliary_losses() as auxiliary:
                loss = run(model, noise(7, 6).requires_grad_(True)).square().mean()
            (loss + auxiliary.total()).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(g is not None for g in gradients[0].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    def test_compiles_without_a_graph_break(self, label):
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        x = noise(3, 6)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        model.train()
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()

    def test_a_hooked_base_layer_is_called_and_gives_the_same(self, label):
        """Plain layers are computed jointly with the adapter, in their place; others are called, as hooks expect."""
        results = []
        for hooked in (False, True):
            model, calls = randomize(get_peft_model(two_linears(), config(label))).eval(), []
            if hooked:
                for layer in adapter_layers(model).values():
                    layer.get_base_layer().register_forward_hook(lambda *_, calls=calls: calls.append(1))
            x = noise(4, 6).requires_grad_(True)
            out = model(x)
            out.square().sum().backward()
            assert len(calls) == 2 * hooked
            results.append([out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        for joint, apart in zip(*results, strict=True):
            torch.testing.assert_close(joint, apart, rtol=1e-4, atol=1e-5)

    def test_autocast(self, label):
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        x = noise(4, 6).requires_grad_(True)
        known = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), known, rtol=0.1, atol=0.1 * float(known.abs().max()))
        out.float().square().sum().backward()
        assert x.grad.dtype == torch.float32
        assert torch.isfinite(x.grad).all()

    def test_another_adapter_for_each_row_is_refused(self, label):
        model = get_peft_model(two_linears(), config(label))
        layer = next(iter(adapter_layers(model).values()))
        with pytest.raises(ValueError, match="each row"):
            layer(noise(2, 6), adapter_names=["default", "default"])


@pytest.mark.parametrize("label", MERGEABLE)
class TestEveryMergeableVariant:
    def test_merge_is_forward_and_unmerge_is_exact(self, label):
        x = noise(3, 6)
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        expected, before = model(x), weights_of(model)
        model.merge_adapter(safe_merge=True)
        assert not equal(weights_of(model), before)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            pass
        model.unmerge_adapter()
        assert equal(weights_of(model), before)
        assert torch.equal(model(x), expected)

    def test_a_hundred_rounds_in_bf16_change_no_bit(self, label):
        model = randomize(get_peft_model(two_linears().bfloat16(), config(label))).eval()
        before = weights_of(model)
        for _ in range(100):
            model.merge_adapter()
            model.unmerge_adapter()
        assert equal(weights_of(model), before)

    def test_several_merges_are_one(self, label):
        x = noise(3, 6)
        model = get_peft_model(two_linears(), config(label), adapter_name="one").eval()
        model.add_adapter("two", config(label))
        for seed, adapter in enumerate(("one", "two")):
            model.set_adapter(adapter)
            randomize(model, seed)
        model.base_model.set_adapter(["one", "two"])
        expected, before = model(x), weights_of(model)
        model.merge_adapter(["one"])
        model.merge_adapter(["two"])
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert equal(weights_of(model), before)

    def test_merge_without_a_kept_copy_rounds_but_works(self, label):
        changed = config(label)
        if type(changed).uses_base_weight:
            with pytest.raises(ValueError, match="keep_unmerged"):
                type(changed)(keep_unmerged=False)
            return
        changed.keep_unmerged = False
        x = noise(3, 6)
        model = randomize(get_peft_model(two_linears(), changed)).eval()
        expected, before = model(x), weights_of(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        for (weight, _), (found, _) in zip(before, weights_of(model), strict=True):
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)

    def test_safe_merge_refuses_nan(self, label):
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        before = weights_of(model)
        layer = next(iter(adapter_layers(model).values()))
        next(iter(layer.tensors("default").values())).data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            model.merge_adapter(safe_merge=True)
        assert equal(weights_of(model), before)

    def test_merge_and_unload_leaves_a_plain_model(self, label):
        x = noise(3, 6)
        model = randomize(get_peft_model(two_linears(), config(label))).eval()
        expected = model(x)
        plain = model.merge_and_unload()
        assert type(plain) is nn.Sequential
        assert not adapter_layers(plain)
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)

    def test_delta_is_the_change(self, label):
        net, x = two_linears()[2:], noise(5, 8)
        plain = net(x)
        model = randomize(get_peft_model(net, config(label, target_modules=("2",)))).eval()
        delta = next(iter(delta_weights(model).values()))
        bias = model(torch.zeros(1, 8))  # the layer itself has none
        torch.testing.assert_close(model(x) - plain, x @ delta.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", NOT_LINEAR)
def test_a_variant_that_cannot_merge_says_so(label):
    model = randomize(get_peft_model(two_linears(), config(label))).eval()
    before = weights_of(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert equal(weights_of(model), before)
    with pytest.raises(UserError, match="cannot be merged"):
        delta_weights(model)


@pytest.mark.parametrize("label", ON_CONVOLUTIONS)
class TestConvolutions:
    def test_starts_trains_merges_saves(self, label, tmp_path):
        net, x = two_convolutions(), noise(2, 3, 8, 8)
        base, expected = copy.deepcopy(net), net(x)
        model = get_peft_model(net, config(label)).eval()
        assert torch.equal(model(x), expected)
        randomize(model)
        out, before = model(x), weights_of(model)
        assert not torch.allclose(out, expected)
        out.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), out)
        model.merge_adapter()
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert equal(weights_of(model), before)


@pytest.mark.parametrize("label", [label for label in VARIANTS if label not in ON_CONVOLUTIONS])
def test_a_layer_that_does_not_fit_is_refused(label):
    with pytest.raises(ValueError, match="cannot adapt a Conv2d"):
        get_peft_model(two_convolutions(), config(label))


@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_of_the_command_line_trains(name):
    """Ours and PEFT's own, by name."""
    model = get_peft_model(two_linears(), config(name))
    assert is_dead(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        with auxiliary_losses() as auxiliary:
            loss = (model(noise(8, 6)) - 1).square().mean()
        (loss + auxiliary.total()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not is_dead(model)
    assert adapter_state(model)


def test_dropout_only_in_training():
    for label in [label for label, (name, _) in VARIANTS.items() if name != "glora"]:
        model = randomize(get_peft_model(two_linears(), config(label, dropout=0.5)))
        x = noise(3, 6)
        with auxiliary_losses():
            assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_stock_peft_refuses_the_file(tmp_path):
    """Without rankfold, PEFT must say that it does not know the adapter, not load half of it."""
    get_peft_model(two_linears(), config("moslora")).save_pretrained(tmp_path)
    code = (
        "from peft import PeftModel; from torch import nn;"
        f"PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), {str(tmp_path)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "MOSLORA" in result.stderr


@pytest.mark.parametrize("order", ["import rankfold; import peft", "import peft; import rankfold"])
def test_importing_rankfold_makes_stock_peft_read_the_files(order, tmp_path):
    for name in REGISTRY:
        get_peft_model(two_linears(), config(name)).save_pretrained(tmp_path / name)
    code = f"{order}; from torch import nn\n"
    code += "net = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))\n"
    for name in REGISTRY:
        code += f"peft.PeftModel.from_pretrained(net(), {str(tmp_path / name)!r})\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dropout_drops_its_share():
    """Ours is drawn otherwise than torch's, so its share, its scale and its independence are looked at."""
    from rankfold.toolkit.adapters.variants.fvae_objective import dropout_

    torch.manual_seed(0)
    for p in (0.1, 0.5):
        out = dropout_(torch.ones(400, 501), p)
        assert (out == 0).float().mean() == pytest.approx(p, abs=0.005)
        assert out.max() == pytest.approx(1 / (1 - p))
        dropped = (out == 0).float() - p
        for shift in (1, 2, 4, 501):
            assert abs((dropped.flatten()[shift:] * dropped.flatten()[:-shift]).mean()) < 0.005
    assert not torch.equal(dropout_(torch.ones(99), 0.5), dropout_(torch.ones(99), 0.5))
