"""Numbers of the papers' released code (or of the formula, where there is none), to 1e-9 in float64.

RANKFOLD_REFERENCE names the folder; shapes are read from the tensors, so that vectors of other shapes and seeds serve too.
"""

import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from rankfold import FvaeLoraConfig, GloraConfig, LoraTrfConfig, MosLoraConfig
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.adapters.auxiliary import auxiliary_losses, token_weights
from rankfold.toolkit.adapters.variants.loratrf import gate_and_filter
from rankfold.toolkit.core.change import Change

FOLDER = Path(os.environ.get("RANKFOLD_REFERENCE", Path(__file__).parents[3] / "shared" / "reference"))
PATHS = [(form, number) for form in ("bias", "nobias") for number in range(12)]


def load(name):
    file = FOLDER / f"{name}.safetensors"
    if not file.is_file():
        pytest.skip(f"no reference vectors at {file}")
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def close(found, known):
    torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-9)


def adapt_layer(known, config, tensors):
    """The layer of the reference with our adapter on it, in float64, its tensors set."""
    layer = nn.Linear(known["weight"].shape[1], known["weight"].shape[0], bias="bias" in known).double()
    layer.weight.data = known["weight"].clone()
    if "bias" in known:
        layer.bias.data = known["bias"].clone()
    model = get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).double()
    adapter = next(iter(adapter_layers(model).values()))
    ours = adapter.tensors("default")
    assert set(tensors) == set(ours)
    for name, value in tensors.items():
        assert ours[name].shape == value.shape, name
        ours[name].data = value.clone()
    return model, adapter


def test_every_file_is_tested():
    known = {"moslora", "fvae_concat", "fvae_average", "glora_elementwise_bias", "glora_elementwise_nobias"}
    known |= {"glora_matmul", "composition", "loratrf"}
    if not FOLDER.is_dir():
        pytest.skip(f"no reference vectors at {FOLDER}")
    assert {file.stem for file in FOLDER.glob("*.safetensors")} <= known


def test_moslora():
    known, _ = load("moslora")
    config = MosLoraConfig(r=len(known["mixer"]), alpha=float(known["alpha"]), target_modules=["0"])
    model, layer = adapt_layer(known, config, {name: known[name] for name in ("down", "mixer", "up")})
    close(model(known["x"]), known["y"])
    close(layer.get_delta_weight("default"), known["delta_weight"])


@pytest.mark.parametrize("fusion", ["concat", "average"])
class TestFvae:
    def layer(self, fusion):
        known, _ = load(f"fvae_{fusion}")
        tensors = {"up": known["up"], "decoder_std": known["dec.std"]}
        for k in ("1", "2"):
            for part in ("trunk", "mean", "logvar"):
                for kind in ("weight", "bias"):
                    tensors[f"{part}{k}_{kind}"] = known[f"enc{k}.{part}.{kind}"]
        depth = sum(key.startswith("dec.") and key.endswith("weight") for key in known) - 1
        for number in [*range(depth), "out"]:
            for kind in ("weight", "bias"):
                name = "decoder_out" if number == "out" else f"decoder{number}"
                tensors[f"{name}_{kind}"] = known[f"dec.{number}.{kind}"]
        config = FvaeLoraConfig(
            r=known["up"].shape[1],
            alpha=float(known["alpha"]),
            encoder_width=known["enc1.trunk.weight"].shape[0],
            decoder_width=known["dec.0.weight"].shape[0],
            decoder_layers=depth,
            encoder_dropout=0.0,
            decoder_dropout=0.0,
            fusion=fusion,
            target_modules=["0"],
            detach=False,
        )
        return known, *adapt_layer(known, config, tensors)

    def test_outputs(self, fusion, monkeypatch):
        known, model, _ = self.layer(fusion)
        close(model.eval()(known["x"]), known["y_eval"])
        monkeypatch.setattr(torch, "randn_like", lambda like: known["eps1"])
        with auxiliary_losses():
            close(model.train()(known["x"]), known["y_train"])

    def test_terms(self, fusion, monkeypatch):
        known, _, layer = self.layer(fusion)
        layer.train()
        t, x = layer.tensors("default"), known["x"]
        codes = {}
        for k in ("1", "2"):
            monkeypatch.setattr(torch, "randn_like", lambda like, k=k: known[f"eps{k}"])
            codes[k] = layer.encode("default", t, x @ t[f"trunk{k}_weight"].T, k)
            close(codes[k].mean, known[f"z{k}_mean"])
            close(codes[k].z, known[f"z{k}_sample"])
        terms = layer.loss_terms("default", t, x, codes["1"], codes["2"], token_weights(x))
        for name, value in terms.items():
            close(value, known[name])

    @pytest.mark.parametrize(
        ("name", "weights"), [("default", {}), ("rec01_kl10", {"reconstruction": 0.1, "kl": 10.0})]
    )
    def test_weighted_sum_and_its_gradients(self, fusion, name, weights, monkeypatch):
        known, model, layer = self.layer(fusion)
        draws = iter([known["eps1"], known["eps2"]])
        monkeypatch.setattr(torch, "randn_like", lambda like: next(draws))
        config = layer.settings["default"]
        for key, value in ({"loss_weight": 1.0} | weights).items():
            setattr(config, key, value)
        x = known["x"].clone().requires_grad_(True)
        with auxiliary_losses() as auxiliary:
            model.train()(x)
        close(auxiliary.total(), known[f"elbo_loss_{name}"])
        auxiliary.total().backward()
        ours = {key: value.grad for key, value in layer.tensors("default").items()} | {"x": x.grad}
        theirs = plain_objective(known, layer, weights, fusion)
        assert ours.pop("up") is None
        for key, gradient in ours.items():
            close(gradient, theirs[key])


def plain_objective(known, layer, weights, fusion):
    """Gradients of the objective by torch.distributions and plain layers, as the paper's code writes it."""
    from torch.distributions import MultivariateNormal, Normal, kl_divergence

    t = {key: value.detach().clone().requires_grad_(True) for key, value in layer.tensors("default").items()}
    x = known["x"].clone().requires_grad_(True)
    z, posterior = {}, {}
    for k in ("1", "2"):
        hidden = torch.relu(x @ t[f"trunk{k}_weight"].T + t[f"trunk{k}_bias"])
        mean = hidden @ t[f"mean{k}_weight"].T + t[f"mean{k}_bias"]
        logvar = hidden @ t[f"logvar{k}_weight"].T + t[f"logvar{k}_bias"]
        posterior[k] = Normal(mean, (logvar / 2).exp())
        z[k] = mean + (logvar / 2).exp() * known[f"eps{k}"]
    hidden = torch.cat((z["1"], z["2"]), -1) if fusion == "concat" else (z["1"] + z["2"]) / 2
    for number in range(layer.settings["default"].decoder_layers):
        hidden = torch.relu(hidden @ t[f"decoder{number}_weight"].T + t[f"decoder{number}_bias"])
    back = hidden @ t["decoder_out_weight"].T + t["decoder_out_bias"]
    nll = -MultivariateNormal(back, scale_tril=torch.diag(t["decoder_std"] + 1e-5)).log_prob(x).mean()
    kl = kl_divergence(posterior["1"], Normal(0.0, 1.0)).sum(-1).mean()
    loss = weights.get("reconstruction", 1.0) * nll + weights.get("kl", 1.0) * kl
    (loss + (z["2"] - 1.5).square().mean() - z["1"].square().mean()).backward()
    return {key: value.grad for key, value in t.items()} | {"x": x.grad}


@pytest.mark.parametrize(("form", "number"), PATHS)
def test_glora_elementwise(form, number):
    known, header = load(f"glora_elementwise_{form}")
    paths = header["paths_ABCDE"].split(";")
    if number >= len(paths):
        pytest.skip("no such path in the reference")
    path = dict(zip("abcde", paths[number].split(","), strict=True))
    tensors = {}
    for part in "ab":
        up, down = known[f"{part.upper()}_up"], known[f"{part.upper()}_down"]
        if path[part] == "lora":
            tensors |= {f"{part}_up": up, f"{part}_down": down}
        elif path[part] != "none":
            tensors[f"{part}_up"] = up[:, :1] if path[part] == "vector" else up[:1, :1]
    if path["c"] == "lora":
        tensors |= {"c_up": known["C_up"], "c_down": known["C_down"]}
    elif path["c"] == "vector":
        tensors["c_up"] = known["C_up"][:, :1]
    for part in "de":
        if path[part] != "none" and (part == "e" or "bias" in known):  # without a bias there is nothing for D to scale
            tensors[part] = known[part.upper()] if path[part] == "vector" else known[part.upper()][:1]
    config = GloraConfig(r=known["A_down"].shape[0], form="elementwise", target_modules=["0"], **path)
    model, _ = adapt_layer(known, config, tensors)
    close(model(known["x"]), known[f"y.{number}"])
    model.merge_adapter()
    close(model(known["x"]), known[f"y.{number}"])


def test_glora_matmul():
    known, _ = load("glora_matmul")
    config = GloraConfig(r=known["a2"].shape[0], target_modules=["0"])
    tensors = {"a_up": known["a1"], "a_down": known["a2"], "b_up": known["b1"], "b_down": known["b2"]}
    tensors |= {"c_up": known["c"][:, None], "d": known["d"], "e": known["e"]}
    model, layer = adapt_layer(known, config, tensors)
    close(model(known["x"]), known["y"])
    model.merge_adapter()
    close(layer.get_base_layer().weight.data, known["weight_merged"])
    close(layer.get_base_layer().bias.data, known["bias_merged"])


def test_loratrf():
    known, _ = load("loratrf")
    r, filter_r = known["down"].shape[0], known["filter_down"].shape[0]
    config = LoraTrfConfig(r=r, alpha=float(known["alpha"]), filter_r=filter_r, target_modules=["0"])
    names = ("down", "up", "filter_down", "filter_up", "task")
    model, layer = adapt_layer(known, config, {name: known[name] for name in names})
    close(gate_and_filter(layer.base_layer(known["x"]), known["task"], known["filter_down"])[0], known["gate"])
    close(model(known["x"]), known["y"])


def test_composition():
    known, _ = load("composition")
    count = len(known["logits"])
    changes = []
    for n in range(count):
        down, up = known[f"down.{n}"], known[f"up.{n}"]
        changes.append(Change(down=down, up=up).scale(float(known[f"alpha.{n}"]) / len(down)))
    logits = known["logits"].clone().requires_grad_(True)
    weights = logits.softmax(0)
    close(weights, known["weights"])

    def output(shares):
        total = sum((change.scale(share) for change, share in zip(changes, shares, strict=True)), Change())
        delta = total.delta_weight(known["weight"])
        return known["x"] @ (known["weight"] + delta).T + known["bias"], delta

    y, delta = output(weights)
    close(y, known["y_learned"])
    close(delta, known["delta_learned"])
    close(output([1 / count] * count)[0], known["y_uniform"])
    loss = (y - known["target"]).square().mean()
    close(loss, known["loss"])
    loss.backward()
    close(logits.grad, known["grad_logits"])
