"""Several adapters as one: exact sums, right gradients, learned weights with exact resume, the library, every mistake."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from settings import quick_config
from short_runs import compose_config, train_until
from torch import nn

from rankfold.apps.cli import main
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.adapters import composition
from rankfold.toolkit.adapters.approximate import low_rank
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.adapters.composition import MixingCoefficients, Mixture
from rankfold.toolkit.adapters.fold import fold
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.change import Change
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.load import open_model
from rankfold.toolkit.formats.adapter_facts import read_facts
from rankfold.toolkit.formats.adapter_folder import check_adapter_folder
from rankfold.toolkit.formats.peft_merge import peft_merge
from rankfold.toolkit.formats.source import load_source
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.launch.start import compose, resume, train
from rankfold.training.runs import library

# ---------------------------------------------------------------------------------------------- the sum


def some_changes(out, fan_in):
    """Three sources of different rank and kind: plain, with a bias and a mask, and nothing at all."""
    torch.manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    plain = Change(down=noise(2, fan_in), up=noise(out, 2))
    other = Change(
        down=noise(3, fan_in), up=noise(out, 3), bias=noise(out), rows=noise(out), mask_up=noise(out, 1),
        mask_down=noise(1, fan_in),
    )  # fmt: skip
    return [plain, other, Change()]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Conv2d(3, 4, 3, padding=1)])
def test_mixture_is_the_weighted_sum_and_its_gradient_is_right(base, free):
    base = base.requires_grad_(False).double()
    weight = base.weight.detach().flatten(1)
    changes = some_changes(*weight.shape)
    mixture = Mixture(base, changes, MixingCoefficients(3, temperature=0.7, free=free)).double()
    torch.nn.init.normal_(mixture.coefficients.logits)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64) if isinstance(base, nn.Conv2d) else torch.randn(4, 6).double()
    logits = mixture.coefficients.logits.detach().clone().requires_grad_(True)
    w = logits if free else (logits / 0.7).softmax(0)
    delta = sum(w[n] * change.delta_weight(weight) for n, change in enumerate(changes))
    bias = w[1] * changes[1].bias
    bias = bias if base.bias is None else base.bias + bias
    if isinstance(base, nn.Conv2d):
        known = nn.functional.conv2d(x, (weight + delta).view(base.weight.shape), bias, padding=1)
    else:
        known = nn.functional.linear(x, weight + delta, bias)
    out = mixture(x)
    torch.testing.assert_close(out, known)
    known.square().mean().backward()
    out.square().mean().backward()
    torch.testing.assert_close(mixture.coefficients.logits.grad, logits.grad)
    assert [name for name, p in mixture.named_parameters() if p.requires_grad] == ["coefficients.logits"]


def test_starts_uniform():
    assert torch.equal(MixingCoefficients(4)(), torch.full((4,), 0.25))
    assert torch.equal(MixingCoefficients(4, free=True)(), torch.full((4,), 0.25))


def test_weighted_is_the_exact_sum_of_ranks():
    changes = some_changes(5, 6)
    weight = torch.randn(5, 6, dtype=torch.float64)
    whole = composition.sum_sources([{"a": c} for c in changes], [0.2, -1.5, 3.0])["a"]
    known = sum(w * c.delta_weight(weight) for w, c in zip([0.2, -1.5, 3.0], changes, strict=True))
    torch.testing.assert_close(whole.delta_weight(weight), known)
    assert len(whole.down) == 5


def test_cut_is_the_best_of_its_rank():
    """By way of small matrices the same as the singular value decomposition of the whole one."""
    torch.manual_seed(0)
    change = Change(down=torch.randn(12, 30), up=torch.randn(40, 12))
    short, error = low_rank(change, torch.zeros(40, 30), max_rank=5)
    dense = change.up @ change.down
    left, values, right = torch.linalg.svd(dense)
    best = (left[:, :5] * values[:5]) @ right[:5]
    torch.testing.assert_close(short.up @ short.down, best, rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-4)
    assert low_rank(change, torch.zeros(40, 30), max_rank=12) == (change, 0.0)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.attentions.1.transformer_blocks.0"),
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj", "unet.down_blocks.0.attentions.1.transformer_blocks.0"),
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("time_embedding.linear_1", "time_embedding"),
    ],
)  # fmt: skip
def test_blocks(name, block):
    assert composition.block_name(name) == block


def a_language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(small).eval(), ("q_proj", "v_proj"), {"input_ids": torch.arange(12)[None] % 64}


def a_transformer():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    return model, ("to_q", "to_v"), inputs


@pytest.mark.parametrize("make", [a_language_model, a_transformer])
def test_other_models(make):
    """Adapters of different variants on a language model and a diffusion transformer: mixed, the model is the sum."""
    sources = []
    for seed, (name, rank) in enumerate([("moslora", 2), ("glora", 3), ("lora", 4)]):
        model, targets, inputs = make()
        config = make_config(name, rank=rank, alpha=4.0, dropout=0.0, target_modules=targets)
        wrapped = get_peft_model(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        sources.append(fold(model))
    plain, _, _ = make()
    base = {name: plain.get_submodule(name).weight.detach().clone() for name in sources[0]}
    mixed, _, _ = make()
    mixtures = composition.attach_sources(
        mixed.requires_grad_(False), sources, composition.coefficient_factory("layer", lambda: MixingCoefficients(3))
    )
    with torch.no_grad():
        for name in base:
            layer = plain.get_submodule(name)
            layer.weight += sum(source[name].delta_weight(base[name]) for source in sources) / 3
            biases = [source[name].bias for source in sources if source[name].bias is not None]
            if biases:
                bias = sum(biases) / 3
                layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    torch.testing.assert_close(mixed(**inputs)[0], plain(**inputs)[0], rtol=1e-4, atol=1e-4)
    mixed(**inputs)[0].square().mean().backward()
    assert all(m.coefficients.logits.grad.abs().sum() > 0 for m in mixtures.values())
    assert sum(p.numel() for p in mixed.parameters() if p.requires_grad) == 3 * len(base)


# ---------------------------------------------------------------------------------------------- with real adapters


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("library")


@pytest.fixture(autouse=True)
def use_library(library_folder, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(library_folder))


@pytest.fixture(scope="module")
def runs(base, images, tmp_path_factory):
    """Three adapters of different variant, rank, alpha and targets; the second also on the text encoder."""
    import os

    os.environ["RANKFOLD_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    common = quick_config(
        SubjectConfig,
        base=str(base),
        images=images,
        steps=3,
        batch_size=2,
        learning_rate=0.05,
        preview_every=0,
        threads=1,
    )
    settings = [
        {"adapter": "moslora", "rank": 4, "alpha": 8.0},
        {"adapter": "glora", "rank": 2, "train_text_encoder": True, "preview_every": 3, "preview_steps": 1},
        {"adapter": "lora", "rank": 3, "target_modules": ("to_q", "ff.net.2"), "token": "abc"},
    ]
    made = []
    for number, changes in enumerate(settings):
        out = tmp_path_factory.mktemp("source") / f"run{number}"
        made.append(train(replace(common, out=out, seed=number, **changes)))
    return made


def changes_in(base, folder):
    return load_source(folder, open_model(str(base))).parts


def deltas(base, parts):
    model = open_model(str(base))
    return {
        f"{part}.{name}": change.delta_weight(getattr(model, part).get_submodule(name).weight.detach().flatten(1))
        for part, folded in parts.items()
        for name, change in folded.items()
    }


def test_sources_leave_the_model_as_it_was(base, runs):
    model = open_model(str(base))
    names = [name for name, _ in model.unet.named_modules()]
    for run in runs:
        load_source(run.folder, model)
    assert [name for name, _ in model.unet.named_modules()] == names
    assert not adapter_layers(model.unet)
    assert not adapter_layers(model.text_encoder)


def test_uniform_weighted_and_its_exports(base, runs, tmp_path):
    run = compose(compose_config(base, runs, tmp_path / "out", weights=(0.5, 0.25, -1.0)))
    sources = [deltas(base, changes_in(base, r.folder)) for r in runs]
    found = deltas(base, changes_in(base, run.folder))
    assert set(found) == set().union(*sources)
    for name, delta in found.items():
        known = sum(w * s[name] for w, s in zip((0.5, 0.25, -1.0), sources, strict=True) if name in s)
        torch.testing.assert_close(delta, known, rtol=1e-4, atol=1e-6)
    assert check_adapter_folder(run.adapter) == ["unet", "text_encoder"]
    proof = export_adapter(run.adapter, str(base), "diffusers", tmp_path / "export")
    assert proof.weight_error < 1e-6
    assert proof.image_difference < 1e-5
    with safe_open(proof.path, "pt") as file:
        header = file.metadata()
    assert [s["name"] for s in json.loads(header["composed_of"])] == [r.folder.name for r in runs]
    assert json.loads(header["composed_weights"]) == {"everywhere": [0.5, 0.25, -1.0]}
    uniform = compose(compose_config(base, runs[:2], tmp_path / "uniform"))
    assert read_facts(uniform.adapter).composed_weights == {"everywhere": [0.5, 0.5]}


def test_a_lora_file_is_a_source_too(base, runs, tmp_path):
    proof = export_adapter(runs[0].adapter, str(base), "kohya", tmp_path)
    from_file = deltas(base, changes_in(base, proof.path))
    from_folder = deltas(base, changes_in(base, runs[0].folder))
    assert from_file.keys() == from_folder.keys()
    for name, delta in from_file.items():
        torch.testing.assert_close(delta, from_folder[name], rtol=1e-4, atol=1e-6)


def test_cut_to_a_rank(base, runs, tmp_path, capsys):
    words = [str(r.folder) for r in runs[::2]]
    main(["compose", *words, "--base", str(base), "--max-rank", "5", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "is missed by up to" in said
    parts = changes_in(base, tmp_path / "out")
    assert max(len(change.down) for folded in parts.values() for change in folded.values()) == 5


def test_peft_cat_agrees_with_the_sum(base, runs, tmp_path):
    """PEFT's one exact merge, on the two plain sources with the same layers, is an independent check."""
    model = open_model(str(base))
    folded = [load_source(run.folder, model).parts["unet"] for run in runs[:2]]
    folded = [{n: replace(c, bias=None) for n, c in f.items()} for f in folded]
    merged = peft_merge(model.unet, folded, [0.3, 0.9], "cat", density=1.0)
    known = composition.sum_sources(folded, [0.3, 0.9])
    assert not adapter_layers(model.unet)
    for name, change in merged.items():
        weight = model.unet.get_submodule(name).weight.detach()
        torch.testing.assert_close(change.delta_weight(weight), known[name].delta_weight(weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["svd", "ties", "dare_ties", "magnitude_prune"])
def test_peft_merges(base, runs, tmp_path, method):
    run = compose(compose_config(base, [runs[0], runs[0]], tmp_path / method, merge=method))
    images = generate(
        Recipe(prompt="a sks creature", base=str(base), adapters=(str(run.adapter),), strengths=(1.0,), steps=2)
    )
    assert len(images) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"tie": "block", "free": True}, {"tie": "global", "temperature": 0.5}, {"tie": "column"}]
)
def test_learned_weights_resume_exactly(base, runs, images, tmp_path, changes, capsys):
    config = compose_config(base, runs, tmp_path / "whole", images=images, learning_rate=0.1, **changes)
    whole = train(config)
    said = capsys.readouterr().out
    weights = read_facts(whole.adapter).composed_weights
    sets = {tuple(row) for row in weights.values()}
    assert all(len(row) == 3 for row in weights.values())
    if changes.get("tie") == "global":
        assert len(sets) == 1
        assert "Learning 3 weights" in said
    elif not changes:
        assert f"Learning {3 * len(weights)} weights" in said
        assert len(sets) > len(weights) / 2
    if changes.get("tie") == "column":
        assert read_facts(whole.adapter).composed_how == "weighted sum by columns"
        assert len(sets) == len(weights)
    elif not changes.get("free"):
        assert all(sum(row) == pytest.approx(1.0, abs=1e-4) for row in sets)
    assert any(abs(w - 1 / 3) > 0.01 for row in sets for w in row)
    part = train_until(replace(config, out=tmp_path / "part"), 3)
    resume(part.folder)
    again = deltas(base, changes_in(base, part.folder))
    for name, delta in deltas(base, changes_in(base, whole.folder)).items():
        assert torch.equal(delta, again[name])
    assert isinstance(from_yaml(whole.config_file), ComposeConfig)


def test_learning_finds_the_right_source(base, images, runs, tmp_path):
    """On the images that one source was trained on for long, and the others not, its weight grows."""
    good = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "good",
            steps=60,
            batch_size=4,
            rank=4,
            learning_rate=0.01,
            preview_every=0,
            threads=1,
            seed=5,
        )
    )
    config = compose_config(
        base, [runs[0], good], tmp_path / "out", images=images, steps=60, batch_size=4, learning_rate=0.1, tie="global"
    )
    found = train(config)
    weights = read_facts(found.adapter).composed_weights
    assert next(iter(weights.values()))[1] > 0.6


# ---------------------------------------------------------------------------------------------- the library


def test_library(base, runs, tmp_path, capsys):
    main(["library", "list"])
    assert "empty" in capsys.readouterr().out
    main(["library", "add", str(runs[1].folder), "--name", "second"])
    main(["library", "add", str(runs[0].folder), "--trigger", "a big one"])
    capsys.readouterr()
    main(["library", "list"])
    said = capsys.readouterr().out
    assert "second" in said
    assert "a big one" in said
    entry = library.get("second")
    assert entry.base == str(base)
    assert entry.trigger == "sks creature"
    assert entry.thumbnail is not None
    main(["library", "show", "second"])
    assert entry.hash in capsys.readouterr().out
    main(["compose", "second", "run0", "--base", str(base), "--out", str(tmp_path / "out")])
    assert "0.500  second" in capsys.readouterr().out
    with pytest.raises(UserError, match="Did you mean 'second'"):
        library.get("secnd")
    with pytest.raises(UserError, match="already"):
        library.add(runs[1].folder, name="second")


# ---------------------------------------------------------------------------------------------- mistakes


def test_an_adapter_of_another_architecture(base, runs, tmp_path):
    """It says nothing of its base, so only its parts tell."""
    from rankfold.training.launch.start import compose

    folder = tmp_path / "adapter"
    shutil.copytree(runs[0].adapter, folder)
    (folder / "unet").rename(folder / "transformer")
    (folder / "rankfold.json").unlink()
    with pytest.raises(UserError, match="has no transformer"):
        compose(quick_config(ComposeConfig, base=str(base), adapters=(str(folder),), out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "No adapters were given"),
        (["nowhere/to/be/seen"], "does not exist"),
        (["RUN0", "RUN1", "--weights", "1"], "--weights holds 1 numbers for 2 adapters"),
        (["RUN0", "RUN1", "--merge", "tis"], "Did you mean 'ties'"),
        (["RUN0", "RUN1", "--merge", "linear"], "--merge linear: PEFT refuses"),
        (["RUN0", "--weights", "1", "--images", "IMAGES"], "leave --weights and --merge out"),
        (["RUN0", "RUN1", "--base", "tiny"], "was trained on"),
        (["RUN0", "--temperature", "0"], "--temperature must be above 0"),
        (["RUN0", "--max-rank", "-1"], "--max-rank must be at least 0"),
        (["RUN0", "--images", "IMAGES", "--preservation-weight", "1"], "--preservation-weight is for new adapters"),
        (["IMAGES"], "must hold one .safetensors file"),
    ],
)
def test_mistakes(words, sentence, base, images, runs, tmp_path, capsys):
    places = {"RUN0": str(runs[0].folder), "RUN1": str(runs[1].folder), "IMAGES": str(images)}
    words = [places.get(word, word) for word in words]
    words += [] if "--base" in words else ["--base", str(base)]
    with pytest.raises(SystemExit) as end:
        main(["compose", *words, "--class-noun", "creature", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    import re

    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert "Traceback" not in said


def test_full_rank_is_refused_before_training_or_cut(base, images, runs, tmp_path):
    loha = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "loha",
            steps=2,
            batch_size=2,
            adapter="loha",
            rank=2,
            preview_every=0,
            threads=1,
        )
    )
    config = compose_config(base, [runs[0], loha], tmp_path / "out", images=images, steps=2)
    with pytest.raises(UserError, match="--max-rank"):
        train(config)
    with pytest.raises(UserError, match="--max-rank"):
        compose(replace(config, images=None, out=tmp_path / "fixed"))
    run = train(replace(config, max_rank=8, out=tmp_path / "short"))
    assert read_facts(run.adapter).composed_cut_error >= 0


def test_an_adapter_that_is_not_linear_is_refused(base, images, runs, tmp_path):
    fvae = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "fvae",
            steps=1,
            batch_size=2,
            adapter="fvae",
            rank=4,
            preview_every=0,
            threads=1,
        )
    )
    with pytest.raises(UserError, match="not linear"):
        compose(compose_config(base, [runs[0], fvae], tmp_path / "out"))
