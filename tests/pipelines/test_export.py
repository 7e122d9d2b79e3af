"""Every format of every adapter: written, read back by the reader's own loader, and compared."""

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankfold.apps.cli import main
from rankfold.pipelines.convert import convert
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, load_pipeline, sampling_pipeline
from rankfold.pipelines.proof import compare_images, compare_weights
from rankfold.toolkit.adapters.attach import adapter_layers, attach
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.change import Change
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats import write as lora_write
from rankfold.toolkit.formats.apply import apply_to_pipeline
from rankfold.toolkit.formats.folder_report import inspect_adapter
from rankfold.toolkit.formats.methods import Frozen, layer_change
from rankfold.toolkit.formats.native import save_native
from rankfold.toolkit.formats.read import from_tensors, read_lora
from rankfold.toolkit.formats.report import inspect_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTERS = {
    "lora": ("lora", {}),
    "moslora": ("moslora", {}),
    "glora": ("glora", {}),
    "glora-ab": ("glora", {"c": "none", "d": "none", "e": "none"}),
    "glora-elementwise": ("glora", {"form": "elementwise", "c": "none", "d": "none", "e": "none"}),
    "fvae": ("fvae", {}),
    "fvae-identity": ("fvae", {"encoder_activation": "identity"}),
    "loratrf": ("loratrf", {}),
    "loratrf-subspace": ("loratrf", {"filter": "subspace"}),
    "dora": ("dora", {}),
    "loha": ("loha", {}),
    "lokr": ("lokr", {}),
    "gralora": ("gralora", {}),
    "peanut": ("peanut", {"depth": "2"}),
}
EXACT = [
    ("lora", "diffusers"),
    ("lora", "peft"),
    ("lora", "kohya"),
    ("moslora", "kohya"),
    ("glora-ab", "peft"),
    ("glora", "diffusers"),
    ("glora", "peft"),
    ("glora-ab", "kohya-glora"),
    ("glora-elementwise", "kohya-full"),
    ("loratrf-subspace", "peft"),
    ("dora", "kohya-full"),
    ("loha", "kohya-full"),
    ("lokr", "kohya-full"),
    ("gralora", "kohya-full"),
    ("peanut", "diffusers"),
    ("lora", "comfyui"),
    ("lora", "kohya-lycoris"),
    ("dora", "kohya-lycoris"),
    ("loha", "kohya-lycoris"),
    ("lokr", "kohya-lycoris"),
]


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A folder for each adapter on denoiser and text encoder, with tensors that no start of training has."""
    made = {}

    def folder(label):
        if label not in made:
            name, options = ADAPTERS[label]
            pipe = load_pipeline(Recipe(prompt="", base=str(base)))
            out = made[label] = tmp_path_factory.mktemp("adapters") / label
            for part, targets in (("unet", ATTENTION), ("text_encoder", ("q_proj", "k_proj", "v_proj", "out_proj"))):
                torch.manual_seed(1)
                alpha = 4.0 if name == "peanut" else 6.0  # which has none beside its rank
                settings = {"rank": 4, "alpha": alpha, "dropout": 0.0, "options": options}
                attach(getattr(pipe, part), make_config(name, target_modules=targets, **settings))
                for parameter in getattr(pipe, part).parameters():
                    if parameter.requires_grad:
                        parameter.data += 0.05 * torch.randn_like(parameter)
                save_native(getattr(pipe, part), out / part)
            (out / "rankfold.json").write_text(json.dumps({"token": "sks", "base": "tiny"}))
        return made[label]

    return folder


@pytest.mark.parametrize(("label", "format"), EXACT)
def test_export_is_exact(adapters, sampled, plain_pipe, base, tmp_path, label, format):
    proof = export_adapter(adapters(label), str(base), format, tmp_path)
    assert proof.exact
    assert proof.weight_error < 1e-5
    assert proof.image_difference < 1e-5
    assert proof.effect > 0.01
    assert proof.layers == 56 + 8
    assert proof.reader == {"diffusers": "diffusers", "peft": "PEFT", "kohya": "diffusers"}.get(format, "rankfold")
    assert proof.proven_by_reader == (proof.reader != "rankfold")
    assert proof.relative_error < 1e-5
    assert not proof.fault()
    comes_back(sampled(label), proof.path, base, plain_pipe)


@pytest.fixture(scope="module")
def sampled(adapters, base):
    """The parts that an adapter is sampled with."""
    made = {}

    def parts(label):
        if label not in made:
            recipe = Recipe(prompt="", base=str(base), adapters=(str(adapters(label)),), strengths=(1.0,))
            pipe = sampling_pipeline(recipe)
            made[label] = {part: dict(getattr(pipe, part).named_parameters()) for part in ("unet", "text_encoder")}
        return made[label]

    return parts


@pytest.fixture(scope="module")
def plain_pipe(base):
    return load_pipeline(Recipe(prompt="", base=str(base)))


def comes_back(ours, path, base, plain_pipe):
    """What was exported is sampled with and inspected like any other adapter."""
    theirs = sampling_pipeline(Recipe(prompt="", base=str(base), adapters=(str(path),), strengths=(1.0,)))
    for part, own in ours.items():
        for name, parameter in getattr(theirs, part).named_parameters():
            wanted = own[name] if name in own else torch.zeros_like(parameter)  # a bias that the base does not have
            torch.testing.assert_close(parameter, wanted, rtol=1e-4, atol=2e-5)
    report = inspect_adapter(path, plain_pipe)
    assert len(report.layers) == 56 + 8
    assert not [layer for layer in report.layers if layer.fault]


def test_ranks_are_what_they_must_be(adapters, base, tmp_path):
    """Mixer folded away; GLoRA's A and B side by side; FVAE's trunk and mean multiplied out."""
    for label, rank in (("moslora", 4), ("glora-ab", 8), ("fvae-identity", 4)):
        proof = export_adapter(adapters(label), str(base), "diffusers", tmp_path / label)
        assert proof.exact
        assert proof.ranks == (rank, rank)


@pytest.mark.parametrize(
    ("label", "format", "words"),
    [
        ("glora", "kohya", "--drop-bias"),
        ("glora-elementwise", "diffusers", "kohya-full"),
        ("dora", "diffusers", "--approximate"),
        ("fvae", "diffusers", "--approximate"),
        ("loratrf", "kohya-full", "--approximate"),
        ("lora", "kohya-glora", "matmul"),
        ("lora", "lycoris", "is unknown; choose one of diffusers, peft, comfyui"),
    ],
)
def test_what_a_format_cannot_say_is_refused(adapters, base, tmp_path, label, format, words):
    with pytest.raises(UserError, match=words):
        export_adapter(adapters(label), str(base), format, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("label", ["fvae", "loratrf", "glora-elementwise", "dora", "loha"])
def test_approximations_say_their_error(adapters, base, tmp_path, label):
    proof = export_adapter(adapters(label), str(base), "diffusers", tmp_path, max_error=0.05)
    assert not proof.exact
    assert proof.weight_error < 1e-5  # the file itself is faithful to the approximation
    linear = label not in ("fvae", "loratrf")
    assert 0 < proof.approximation <= (0.05 if linear else 1.0)
    assert 0 < proof.image_error < 1  # nearer than no adapter
    with safe_open(proof.path, "pt") as file:
        said = json.loads(file.metadata()["rankfold_proof"])
    assert said["image_error"] == pytest.approx(proof.image_error)
    assert said["approximation"] == pytest.approx(proof.approximation)


def test_a_tighter_bound_needs_more_rank_and_misses_less(adapters, base, tmp_path):
    loose, tight = (
        export_adapter(adapters("dora"), str(base), "diffusers", tmp_path / str(bound), max_error=bound)
        for bound in (0.3, 0.01)
    )
    assert tight.ranks[1] > loose.ranks[1]
    assert tight.image_error < loose.image_error


def test_dropped_biases_are_dropped_and_said(adapters, base, tmp_path):
    proof = export_adapter(adapters("glora"), str(base), "kohya", tmp_path, drop_bias=True)
    assert not proof.exact
    assert proof.image_error > 0
    assert not any(key.endswith("diff_b") for key in load_file(proof.path))


def test_the_proof_can_fail(adapters, base, tmp_path, monkeypatch):
    """A file at the wrong scale is found out."""
    original = lora_write.lora_factors
    monkeypatch.setattr(lora_write, "lora_factors", lambda c, m: (2 * original(c, m)[0], original(c, m)[1]))
    proof = export_adapter(adapters("lora"), str(base), "diffusers", tmp_path)
    assert proof.weight_error > 1e-4
    assert proof.image_difference > 1e-4
    assert proof.relative_error > 0.5
    with pytest.raises(UserError, match="does not reproduce"):
        proof.check()
    assert not list(tmp_path.rglob("*"))  # nothing is kept under the final name, nor beside it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_proof_knows_what_is_no_number(adapters, base, tmp_path, monkeypatch, value):
    """A value that became NaN between writing and reading back; the file that was there before stays."""
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"older")
    original = lora_write.lora_factors

    def spoilt(change, shape):
        down, up = original(change, shape)
        up.view(-1)[0] = value
        return down, up

    monkeypatch.setattr(lora_write, "lora_factors", spoilt)
    proof = export_adapter(adapters("lora"), str(base), "diffusers", tmp_path)
    with pytest.raises(UserError, match="NaN or infinite"):
        proof.check()
    assert "exact" not in " ".join(proof.summary())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


def test_a_layer_that_is_lost_or_new_is_found_out():
    change = Change(down=torch.ones(1, 3), up=torch.ones(3, 1))
    weights = {"unet": {name: torch.zeros(3, 3) for name in "ab"}}
    for read in ({"a": change}, {"a": change, "b": change, "c": change}):
        assert (
            compare_weights({"unet": {"a": change, "b": change}}, {"unet": read}, weights, torch.float32).relative
            == math.inf
        )
    assert compare_weights({"unet": {"a": change}}, {"unet": {"a": change}}, weights, torch.float32).relative == 0
    nan = torch.full((1, 2, 2, 3), math.nan).numpy()
    image = torch.zeros(1, 2, 2, 3).numpy()
    assert compare_images(image, nan, image).largest == compare_images(image, image, nan).relative == math.inf


def test_a_second_export_leaves_nothing_of_the_first(adapters, base, tmp_path):
    export_adapter(adapters("lora"), str(base), "peft", tmp_path)
    alone = tmp_path / "alone"
    shutil.copytree(adapters("lora") / "unet", alone / "unet")
    export_adapter(alone, str(base), "peft", tmp_path).check()
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["rankfold.json", "unet"]


def test_the_name_of_the_file_may_be_given(adapters, base, tmp_path):
    proof = export_adapter(adapters("lora"), str(base), "kohya", tmp_path / "new" / "mine.safetensors", title="mine")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.safetensors"]
    with safe_open(proof.path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.title"] == header["ss_output_name"] == "mine"
    assert header["modelspec.trigger_phrase"] == "sks"
    data = proof.path.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    with pytest.raises(UserError, match="writes a folder"):
        export_adapter(adapters("lora"), str(base), "peft", tmp_path / "mine.safetensors")


@pytest.mark.parametrize("to", ["comfy", "kohya", "diffusers", "peft", "lycoris"])
def test_convert_takes_a_file_to_any_other_format(adapters, base, tmp_path, to):
    """kohya's file with an alpha of its own and a header that says it too: the scale is taken over once."""
    state = {}
    for name, layer in load_pipeline(Recipe(prompt="", base=str(base))).unet.named_modules():
        if name.endswith("attn1.to_q"):
            key, width = f"lora_unet_{name.replace('.', '_')}", layer.in_features
            state |= {
                f"{key}.lora_down.weight": torch.randn(4, width),
                f"{key}.lora_up.weight": torch.randn(width, 4) * 0.02,
            }
            state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "in.safetensors", metadata={"ss_network_alpha": "2", "ss_network_dim": "4"})
    proof = convert(tmp_path / "in.safetensors", to, tmp_path / "out", base=str(base))
    proof.check()
    assert proof.relative_error < 1e-5
    ours, theirs = (
        sampling_pipeline(Recipe(prompt="", base=str(base), adapters=(str(file),), strengths=(1.0,)))
        for file in (tmp_path / "in.safetensors", proof.path)
    )
    own = dict(ours.unet.named_parameters())
    for name, parameter in theirs.unet.named_parameters():
        torch.testing.assert_close(parameter, own[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("label", "format"), [("lora", "kohya"), ("glora-ab", "kohya-glora"), ("glora-elementwise", "kohya-full")]
)
def test_lycoris_reads_the_same_weights(adapters, base, tmp_path, label, format):
    """The library behind kohya's and A1111's non-LoRA support merges our file into the weights we mean."""
    lycoris = pytest.importorskip("lycoris", reason="pip install lycoris_lora")
    path = export_adapter(adapters(label), str(base), format, tmp_path).path
    ours, theirs = (load_pipeline(Recipe(prompt="", base=str(base))).unet for _ in range(2))
    pipe = load_pipeline(Recipe(prompt="", base=str(base)))
    apply_to_pipeline(read_lora(path), pipe)
    ours = pipe.unet
    renamed = {k.replace("lora_unet_", "lycoris_"): v for k, v in load_file(path).items() if k.startswith("lora_unet_")}
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), theirs, weights_sd=renamed)
    assert len(network.loras) == 56
    network.merge_to(1.0)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_convolutions_leave_as_kernels(base, tmp_path):
    pipe = load_pipeline(Recipe(prompt="", base=str(base)))
    attach(pipe.unet, make_config("moslora", rank=3, alpha=3.0, dropout=0.0, target_modules=("conv1", "conv_shortcut")))
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_native(pipe.unet, tmp_path / "adapter" / "unet")
    for format in ("diffusers", "kohya", "kohya-full"):
        proof = export_adapter(tmp_path / "adapter", str(base), format, tmp_path)
        assert proof.weight_error < 1e-5, format
        assert proof.image_difference < 1e-5, format
        assert proof.effect > 0.01


def test_text_encoders_without_an_output_projection_load_too(base, tmp_path):
    """diffusers tells kohya's text-encoder tensors by that layer."""
    pipe = load_pipeline(Recipe(prompt="", base=str(base)))
    for part, targets in (("unet", ATTENTION), ("text_encoder", ("q_proj",))):
        attach(getattr(pipe, part), make_config("lora", rank=2, alpha=2.0, dropout=0.0, target_modules=targets))
        for parameter in getattr(pipe, part).parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        save_native(getattr(pipe, part), tmp_path / "adapter" / part)
    proof = export_adapter(tmp_path / "adapter", str(base), "kohya", tmp_path)
    assert (proof.reader, proof.exact) == ("diffusers", True)
    assert proof.weight_error < 1e-5
    assert proof.image_difference < 1e-5


# ---------------------------------------------------------------------------------------------- reading files of others


def test_inspect_says_what_it_is(adapters, base, tmp_path, capsys):
    path = export_adapter(adapters("moslora"), str(base), "kohya", tmp_path).path
    report = inspect_lora(path, load_pipeline(Recipe(prompt="", base=str(base))))
    assert (report.format, report.is_valid, len(report.layers)) == ("kohya", True, 64)
    assert {layer.rank for layer in report.layers} == {4}
    assert all(0 < layer.relative < 100 for layer in report.layers)
    assert report.loaders["diffusers load_lora_weights"] == "yes"
    main(["inspect", str(path)])
    assert "kohya" in capsys.readouterr().out
    main(["inspect", str(path), "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 64


def test_inspect_reads_our_own_folders(adapters, base, tmp_path, capsys):
    folder = adapters("moslora")
    main(["inspect", str(folder)])
    said = capsys.readouterr().out
    assert re.search(r"unet: r +4\n", said)
    assert "No problems found" in said
    main(["inspect", str(folder), "--base", str(base), "--json"])
    found = json.loads(capsys.readouterr().out)
    by_file = inspect_lora(
        export_adapter(folder, str(base), "diffusers", tmp_path).path, load_pipeline(Recipe(prompt="", base=str(base)))
    )
    own = {layer["name"]: layer["relative"] for layer in found["layers"]}
    assert own == pytest.approx({layer.name: layer.relative for layer in by_file.layers}, rel=1e-4)


def test_inspect_finds_what_is_wrong(adapters, base, tmp_path):
    path = export_adapter(adapters("lora"), str(base), "diffusers", tmp_path).path
    state = load_file(path)
    names = [name for name in state if name.endswith("lora_B.weight")]
    state[names[0]] *= float("nan")
    state[names[1]] *= 0
    save_file(state, tmp_path / "broken.safetensors")
    report = inspect_lora(tmp_path / "broken.safetensors")
    assert sorted(layer.fault for layer in report.layers if layer.fault) == ["not finite", "nothing"]
    assert any("NaN" in line for line in report.advice)
    assert any("alpha" in line for line in report.advice)
    state = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(state, tmp_path / "dead.safetensors")
    assert any("never learned" in line for line in inspect_lora(tmp_path / "dead.safetensors").advice)


@pytest.mark.parametrize("label", ["dora", "loha", "lokr"])
def test_files_of_lycoris_are_understood(base, label):
    """LyCORIS writes, we read: the change is the one LyCORIS makes."""
    lycoris = pytest.importorskip("lycoris", reason="pip install lycoris_lora")
    torch.manual_seed(0)
    options = {
        "dora": {"algo": "lora", "dora_wd": True},
        "loha": {"algo": "loha"},
        "lokr": {"algo": "lokr", "factor": 4},
    }
    net = torch.nn.Sequential(torch.nn.Linear(24, 32))
    before = net[0].weight.detach().clone()
    network = lycoris.create_lycoris(net, 1.0, linear_dim=4, linear_alpha=2.0, **options[label])
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.apply_to()
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    network.restore()
    network.merge_to(1.0)
    wanted = net[0].weight.detach() - before
    file = from_tensors(state)
    (layer,) = file.layers
    assert file.method(layer) == label
    change = layer_change(file.roles(layer), file.scale(layer), Frozen.of(before))
    assert torch.allclose(change.delta_weight(before), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: {k: v for k, v in state.items() if "lora_down" not in k}, "lacks down"),
        (lambda state: {k.replace("attn1", "attn9").replace("attn2", "attn9"): v for k, v in state.items() if "te_" not in k},
         "another base"),
        (lambda state: {k: torch.cat((v, v)) if k.endswith("up.weight") else v for k, v in state.items()}, "another base"),
        (lambda state: {"something": torch.zeros(2)}, "not a LoRA file"),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence(adapters, base, tmp_path, spoil, words):
    path = export_adapter(adapters("lora"), str(base), "kohya", tmp_path).path
    save_file({k: v.contiguous() for k, v in spoil(load_file(path)).items()}, tmp_path / "spoilt.safetensors")
    with pytest.raises(UserError, match=words):
        apply_to_pipeline(read_lora(tmp_path / "spoilt.safetensors"), load_pipeline(Recipe(prompt="", base=str(base))))


def test_a_cut_file_is_no_file(adapters, base, tmp_path):
    path = export_adapter(adapters("lora"), str(base), "kohya", tmp_path).path
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    for name in ("cut", "missing"):
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(tmp_path / f"{name}.safetensors")])
        assert end.value.code == 2


def test_a_change_is_its_parts():
    """Dense change, factors, masks, rows and biases add up, in any order, at any strength."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 5), torch.randn(5)
    change = Change(
        down=torch.randn(2, 5), up=torch.randn(6, 2), rows=torch.randn(6), mask_up=torch.randn(6, 1),
        mask_down=torch.randn(1, 5), bias=torch.randn(6), dense=torch.randn(6, 5),
    )  # fmt: skip
    by_hand = (
        change.up @ change.down
        + change.rows[:, None] * weight
        + (change.mask_up @ change.mask_down) * weight
        + change.dense
    )
    assert torch.allclose(change.delta_weight(weight), by_hand)
    assert torch.allclose(change.scale(0.3).delta_weight(weight) @ x, 0.3 * by_hand @ x, atol=1e-5)
    both = change + replace(change, dense=None).scale(2.0)
    assert torch.allclose(both.delta_weight(weight), 3 * by_hand - 2 * change.dense, atol=1e-4)


def test_every_adapted_layer_is_exported(adapters, base):
    pipe = load_pipeline(Recipe(prompt="", base=str(base), adapters=(str(adapters("moslora")),), strengths=(1.0,)))
    assert len(adapter_layers(pipe.unet)) == 56
