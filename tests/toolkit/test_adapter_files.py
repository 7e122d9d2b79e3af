"""Adapter files of every method, spelling, dtype and family, made at random: read equals the formula by hand, a spoilt file is refused."""

from contextlib import suppress
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tiny_families import BUILDERS, unet

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.families import family_of_denoiser
from rankfold.toolkit.formats.layer_changes import matched_changes
from rankfold.toolkit.formats.match import match_pipeline
from rankfold.toolkit.formats.read import from_tensors, read_lora
from rankfold.toolkit.formats.report import inspect_lora
from rankfold.toolkit.formats.source import load_source

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
)
FAST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return SimpleNamespace(unet=unet(16).requires_grad_(False))


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator) * 0.4


def by_hand(core, a, b):
    """sum over i, j of core[i, j] a[i, o] b[j, n], as loops."""
    out = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:])
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            out += a[i].view(-1, 1, *[1] * (core.dim() - 2)) * b[j].view(1, -1, *[1] * (core.dim() - 2)) * core[i, j]
    return out


def lora(g, w, r):
    out, *fan = w.shape
    down, up = randn(g, r, *fan), randn(g, out, r, *[1] * (w.dim() - 2))
    return {"lora_down.weight": down, "lora_up.weight": up}, sum(
        up.flatten(1)[:, k].view(-1, *[1] * len(fan)) * down[k] for k in range(r)
    )


def locon_cp(g, w, r):
    out, fan, *kernel = w.shape
    ones = [1] * len(kernel)
    down, mid, up = randn(g, r, fan, *ones), randn(g, r, r, *kernel), randn(g, out, r, *ones)
    return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, by_hand(
        mid, up.flatten(1).t(), down.flatten(1)
    )


def loha(g, w, r):
    out, width = len(w), w[0].numel()
    a, b, c, d = randn(g, out, r), randn(g, r, width), randn(g, out, r), randn(g, r, width)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, ((a @ b) * (c @ d)).view(w.shape)


def loha_tucker(g, w, r):
    out, fan, *kernel = w.shape
    one, two = ([randn(g, r, r, *kernel), randn(g, r, out), randn(g, r, fan)] for _ in range(2))
    state = {f"hada_t{n}": t[0] for n, t in ((1, one), (2, two))} | {
        f"hada_w{n}_{letter}": t[place] for n, t in ((1, one), (2, two)) for place, letter in ((1, "a"), (2, "b"))
    }
    return state, by_hand(*one) * by_hand(*two)


def lokr(g, w, r):
    out, fan, *kernel = w.shape
    w1, a, b = randn(g, 2, 2), randn(g, out // 2, r), randn(g, r, fan // 2 * torch.Size(kernel).numel())
    w2 = (a @ b).view(out // 2, fan // 2, *kernel)
    whole = torch.cat([torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(2)], 0)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, whole


def lokr_first(g, w, r):
    out, fan, *kernel = w.shape
    a, b, w2 = randn(g, 2, r), randn(g, r, 2), randn(g, out // 2, fan // 2, *kernel)
    w1 = a @ b
    return {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2}, torch.cat(
        [torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(2)], 0
    )


def glora(g, w, r):
    out, fan, *kernel = w.shape
    ones = [1] * len(kernel)
    a1, a2, b1, b2 = (
        randn(g, fan, r, *ones),
        randn(g, r, fan, *ones),
        randn(g, out, r, *ones),
        randn(g, r, fan, *kernel),
    )
    mixed = torch.einsum("oi...,ij->oj...", w, a1.flatten(1) @ a2.flatten(1))
    return {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}, mixed + (
        b1.flatten(1) @ b2.flatten(1)
    ).view(w.shape)


def full(g, w, r):
    diff = randn(g, *w.shape)
    return {"diff": diff}, diff


MAKERS = {f.__name__: f for f in (lora, locon_cp, loha, loha_tucker, lokr, lokr_first, glora, full)}
CONVOLUTIONS_ONLY = {"locon_cp", "loha_tucker"}
WITHOUT_ALPHA = {"full"}
SPELLINGS = {
    "kohya": lambda n: f"lora_unet_{n.replace('.', '_')}",
    "sgm": lambda n: None,  # filled in from the family's table
    "comfy": lambda n: f"diffusion_model.{n}",
    "diffusers": lambda n: f"unet.{n}",
    "bare": lambda n: n,
    "peft": lambda n: f"unet.base_model.model.{n}",
    "compiled": lambda n: f"unet._orig_mod.{n}",
    "wrapped": lambda n: f"unet.module.{n}",
    "lycoris": lambda n: f"lycoris_{n.replace('.', '_')}",
    "onetrainer": lambda n: f"lora_transformer_{n.replace('.', '_')}",
}


def spell(pipe, spelling, layer):
    if spelling != "sgm":
        return SPELLINGS[spelling](layer)
    table = family_of_denoiser(pipe.unet).original_layers(pipe.unet)
    return "lora_unet_" + next(theirs for theirs, own in table.items() if own.layers == (layer,)).replace(".", "_")


@st.composite
def files(draw):
    """(seed, method, layer, spelling, rank, alpha, dora, dtype)."""
    method = draw(st.sampled_from(sorted(MAKERS)))
    layers = LAYERS[2:] if method in CONVOLUTIONS_ONLY else LAYERS
    return (
        draw(st.integers(0, 999)), method, draw(st.sampled_from(layers)), draw(st.sampled_from(sorted(SPELLINGS))), draw(st.integers(1, 3)),
        draw(st.sampled_from([None, 1.0, 2.5, 0.0, -1.0])), draw(st.sampled_from(["", "inputs", "outputs"])),
        draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])),
    )  # fmt: skip


def make(pipe, drawn):
    """(tensors, layer, the change by hand)."""
    seed, method, layer, spelling, rank, alpha, dora, dtype = drawn
    g = torch.Generator().manual_seed(seed)
    weight, name = pipe.unet.get_submodule(layer).weight, spell(pipe, spelling, layer)
    real = torch.randn

    def rounded(*shape, generator):
        return real(*shape, generator=generator).to(dtype).float()

    torch.randn = rounded  # factors that the dtype holds exactly, before they are multiplied
    try:
        state, delta = MAKERS[method](torch.Generator().manual_seed(seed), weight, rank)
    finally:
        torch.randn = real
    exact = {key: value.to(dtype).float() for key, value in state.items()}
    if any(not torch.equal(exact[key], value) for key, value in state.items()):
        state, dtype = state, torch.float32
    scale = 1.0
    if alpha is not None:
        state["alpha"] = torch.tensor(alpha)
        scale = 1.0 if method in WITHOUT_ALPHA else alpha / rank
    delta = delta * scale
    if dora:
        turned = weight + delta
        dims = tuple(d for d in range(weight.dim()) if d != (1 if dora == "inputs" else 0))
        norm = turned.pow(2).sum(dims, keepdim=True).sqrt()
        magnitude = norm * (1 + 0.3 * torch.rand(norm.shape, generator=g))
        state["dora_scale"] = magnitude
        delta = turned * magnitude / norm - weight
    kept = {key: value.to(dtype) if value.dim() > 1 and key != "dora_scale" else value for key, value in state.items()}
    return {f"{name}.{key}": value.contiguous() for key, value in kept.items()}, layer, delta


def read(pipe, path):
    """What a file changes: layer -> change of its weight, in the weight's shape."""
    file = read_lora(path)
    found = {}
    for part, name, change in matched_changes(file, match_pipeline(file, pipe), pipe):
        weight = getattr(pipe, part).get_submodule(name).weight
        found[name] = change.delta_weight(weight.reshape(len(weight), -1)).view(weight.shape)
    return found


def assert_same(got, layer, delta):
    assert set(got) == {layer}
    assert float((got[layer] - delta).norm()) <= 1e-4 * max(float(delta.norm()), 1e-6)


@FAST
@given(drawn=files())
def test_read_is_the_formula_by_hand(pipe, tmp_path, drawn):
    state, layer, delta = make(pipe, drawn)
    save_file(state, tmp_path / "file.safetensors")
    assert_same(read(pipe, tmp_path / "file.safetensors"), layer, delta)
    assert inspect_lora(tmp_path / "file.safetensors").layers
    assert inspect_lora(tmp_path / "file.safetensors", pipe).layers


def drop(state, name, _draw):
    return {key: value for key, value in state.items() if key != name}


def rename(state, name, draw):
    other = draw(
        st.sampled_from(
            [f"{name}x", f"x{name}", name.replace("_", "-", 1), name.replace("attn1", "attn7"), name.upper()]
        )
    )
    return {other if key == name else key: value for key, value in state.items()}


def reshape(state, name, draw):
    tensor = state[name]
    other = draw(st.sampled_from(["flat", "cut", "double", "none", "scalar", "side"]))
    twice = torch.stack((tensor, tensor))
    changed = {
        "flat": tensor.flatten(), "cut": tensor[: len(tensor) // 2] if tensor.dim() else tensor, "scalar": torch.tensor(1.0),
        "double": twice.flatten(0, 1) if tensor.dim() else twice, "none": tensor.new_zeros(0),
        "side": tensor[None],
    }[other]  # fmt: skip
    return state | {name: changed.contiguous().clone()}


def spoil(state, name, draw):
    tensor = state[name].float().clone()
    tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf")]))
    return state | {name: tensor}


def as_integers(state, name, draw):
    return state | {name: state[name].to(torch.int32)}


MUTATIONS = (drop, rename, reshape, spoil, as_integers)


@settings(FAST, max_examples=80)
@given(drawn=files(), data=st.data())
def test_a_spoilt_file_is_refused_or_does_the_same(pipe, tmp_path, drawn, data):
    state, layer, delta = make(pipe, drawn)
    mutation = data.draw(st.sampled_from(MUTATIONS))
    name = data.draw(st.sampled_from(sorted(state)))
    if name.endswith(".alpha") and mutation in (drop, as_integers):
        return  # a whole file in its own right, at another scale
    if name.endswith(".dora_scale") and mutation is drop:
        return
    path = tmp_path / "spoilt.safetensors"
    save_file(mutation(state, name, data.draw), path)
    got = None
    with suppress(UserError):
        got = read(pipe, path)
    if got is not None:
        assert_same(got, layer, delta)
    with suppress(UserError):
        inspect_lora(path)
        inspect_lora(path, pipe)


@FAST
@given(drawn=files(), place=st.floats(0, 1), byte=st.integers(0, 255))
def test_a_byte_of_the_header_may_be_anything(pipe, tmp_path, drawn, place, byte):
    state, _, _ = make(pipe, drawn)
    raw = bytearray(save(state, metadata={"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 4}'}))
    length = int.from_bytes(raw[:8], "little")
    raw[int(place * (7 + length))] = byte
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(bytes(raw))
    for use in (lambda: read(pipe, path), lambda: inspect_lora(path), lambda: inspect_lora(path, pipe)):
        with suppress(UserError):
            use()


# ---------------------------------------------------------------------------------------------- families


@pytest.fixture(scope="module")
def denoisers():
    """Family -> its pipeline's denoiser, built when first asked for."""
    made = {}

    def build(name):
        if name not in made:
            torch.manual_seed(0)
            whole = BUILDERS[name]()
            part = "unet" if getattr(whole, "unet", None) is not None else "transformer"
            made[name] = SimpleNamespace(**{part: getattr(whole, part).requires_grad_(False)}), part
        return made[name]

    return build


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_original_name_of_a_family_is_read(denoisers, name):
    """Fused layers are cut behind the product, halves turned, by ComfyUI's names and by kohya's."""
    pipe, part = denoisers(name)
    model = getattr(pipe, part)
    table = family_of_denoiser(model).original_layers(model)
    for spelled in ("diffusion_model.{}", "lora_unet_{}"):
        state, want, g = {}, {}, torch.Generator().manual_seed(1)
        for theirs, original in table.items():
            weights = [model.get_submodule(layer).weight for layer in original.layers]
            rows = torch.cat([w.flatten(1) for w in weights if w.dim() > 1] or [torch.zeros(0)])
            if any(w.dim() < 2 for w in weights):
                continue
            key = spelled.format(theirs if "." in spelled[:16] else theirs.replace(".", "_"))
            down, up = randn(g, 2, rows.shape[1]), randn(g, len(rows), 2)
            if weights[0].dim() > 2:
                down, up = down.view(2, *weights[0].shape[1:]), up[..., None, None]
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
            product = up.flatten(1) @ down.flatten(1) * 0.5
            product = torch.cat(product.chunk(2)[::-1]) if original.swapped else product
            want |= dict(zip(original.layers, product.split([len(w) for w in weights]), strict=True))
        file = from_tensors(state) if state else None
        got = (
            {
                n: c.delta_weight(model.get_submodule(n).weight.flatten(1))
                for _, n, c in matched_changes(file, match_pipeline(file, pipe), pipe)
            }
            if file
            else {}
        )
        assert set(got) == set(want)
        for layer, delta in want.items():
            torch.testing.assert_close(got[layer], delta)


@pytest.mark.parametrize(
    ("name", "converter"),
    [("flux2-klein", "convert_flux2_transformer_checkpoint_to_diffusers"),
     ("z-image", "convert_z_image_transformer_checkpoint_to_diffusers"),
     ("krea2", "convert_krea2_transformer_checkpoint_to_diffusers"),
     ("sd", "convert_ldm_unet_checkpoint"), ("sdxl", "convert_ldm_unet_checkpoint")],
)  # fmt: skip
def test_original_names_are_those_that_diffusers_makes_ours_of(denoisers, name, converter):
    """An original checkpoint, taken apart by diffusers' converter of whole checkpoints (FLUX.1's and Lumina's know real widths only)."""
    pipe, part = denoisers(name)
    model = getattr(pipe, part)
    torch.manual_seed(0)
    own = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    original, used = {}, set()
    for theirs, entry in family_of_denoiser(model).original_layers(model).items():
        for kind in ("weight", "bias"):
            keys = [f"{layer}.{kind}" for layer in entry.layers]
            if all(key in own for key in keys) and "_norm" not in theirs:
                rows = torch.cat([own[key] for key in keys])
                original[f"{theirs}.{kind}"] = torch.cat(rows.chunk(2)[::-1]) if entry.swapped else rows
                used.update(keys)
    convert = getattr(single_file_utils, converter)
    if part == "unet":
        made = convert({f"model.diffusion_model.{key}": value for key, value in original.items()}, dict(model.config))
    else:
        made = convert(original | {key: value for key, value in own.items() if key not in used})
    assert len(used) > 15
    for key in used:
        assert torch.equal(made[key], own[key]), key


def test_sgm_names_are_those_of_diffusers(tmp_path):
    """Against the converter that diffusers applies to kohya's files of Stable Diffusion XL."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    table = family_of_denoiser(model).original_layers(model)
    linear = {
        t: o.layers[0]
        for t, o in table.items()
        if isinstance(model.get_submodule(o.layers[0]), torch.nn.Linear) and ".transformer_blocks." in t
    }
    state = {}
    for number, (theirs, ours) in enumerate(linear.items()):
        layer = model.get_submodule(ours)
        key = f"lora_unet_{theirs.replace('.', '_')}"
        state |= {
            f"{key}.lora_down.weight": torch.full((1, layer.in_features), float(number)),
            f"{key}.lora_up.weight": torch.ones(layer.out_features, 1),
        }
    found, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=model.config)
    pipe = SimpleNamespace(unet=model)
    file = from_tensors(state)
    own = {
        name: float(change.down[0, 0]) for _, name, change in matched_changes(file, match_pipeline(file, pipe), pipe)
    }
    for key, tensor in found.items():
        if "lora.down" in key:
            name = key.removeprefix("unet.").replace(".processor.", ".").split("_lora.down")[0].split(".lora.down")[0]
            name = (
                name.replace("attn1.to_out", "attn1.to_out.0")
                .replace("attn2.to_out", "attn2.to_out.0")
                .replace("to_out.0.0", "to_out.0")
            )
            assert own[name] == float(tensor[0, 0]), name
    assert len(own) == len(linear)


# ---------------------------------------------------------------------------------------------- accounting


def test_what_has_no_place_is_refused_or_named(pipe):
    good, _, _ = make(pipe, (1, "lora", LAYERS[0], "kohya", 2, 2.0, "", torch.float32))
    pair = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2)}
    for start in (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_unet_other",
    ):
        file = from_tensors(good | {f"{start}.{key}": value for key, value in pair.items()})
        with pytest.raises(UserError, match="--ignore-unused"):
            match_pipeline(file, pipe)
        match = match_pipeline(file, pipe, ignore_unused=True)
        assert len(match.unused) == 2
        assert "2 of 5 tensors are left out" in match.notes(file)[0]
    file = from_tensors(good | {"something": torch.ones(2), "lora_unet_other.alpha": torch.tensor(1.0)})
    match = match_pipeline(file, pipe)
    assert sorted(match.idle) == ["lora_unet_other.alpha", "something"]
    assert "change nothing" in match.notes(file)[0]
    used = {name for layer in match.places for name in file.layers[layer].values()}
    assert used | set(match.unused) | set(match.idle) == set(file.tensors.infos)


def test_a_layer_twice_is_refused(pipe):
    one, _, _ = make(pipe, (1, "lora", LAYERS[0], "kohya", 2, 2.0, "", torch.float32))
    two, _, _ = make(pipe, (1, "lora", LAYERS[0], "diffusers", 2, 2.0, "", torch.float32))
    with pytest.raises(UserError, match="twice"):
        match_pipeline(from_tensors(one | two), pipe)
    names = {f"unet.{LAYERS[0]}.lora_A.{a}.weight": torch.ones(2, 16) for a in ("one", "two")}
    with pytest.raises(UserError, match="several adapters in it \\(one, two\\)"):
        from_tensors(names)


def test_two_text_encoders_of_one_architecture_are_told_apart(denoisers, tmp_path):
    whole = BUILDERS["sdxl"]()
    encoder = whole.text_encoder
    name = next(n for n, _ in encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    state = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, 16),
        f"base_model.model.{name}.lora_B.weight": torch.ones(16, 2),
    }
    with pytest.raises(UserError, match="text_encoder and text_encoder_2"):
        match_pipeline(from_tensors(state), whole)
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (place,) = match_pipeline(read_lora(folder), whole).places.values()
    assert place.part == "text_encoder_2"


def test_families_are_told_by_their_names(denoisers):
    sd, _ = denoisers("sd3")
    for name, title in (
        ("flux-dev", "FLUX.1"),
        ("z-image", "Z-Image"),
        ("qwen-image", "Qwen-Image"),
        ("flux2-klein", "FLUX.2"),
    ):
        if name not in BUILDERS:
            continue
        pipe, part = denoisers(name)
        table = family_of_denoiser(getattr(pipe, part)).original_layers(getattr(pipe, part))
        names = list(table) or [n for n, m in getattr(pipe, part).named_modules() if isinstance(m, torch.nn.Linear)]
        state = {f"diffusion_model.{n}.lora_{x}.weight": torch.ones(2, 2) for n in names for x in "AB"}
        with pytest.raises(UserError, match=f"base model.*looks like a file for {title}"):
            match_pipeline(from_tensors(state), sd)


def test_source_of_a_file_keeps_words_and_notes(tmp_path, base):
    from rankfold.pipelines.generate import Recipe, load_pipeline

    pipe = load_pipeline(Recipe(prompt="", base=str(base)))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    state = {
        f"unet.{layer}.lora_A.weight": torch.ones(2, 64),
        f"unet.{layer}.lora_B.weight": torch.ones(64, 2),
        "bundle_emb.zorb.string_to_param.*": torch.ones(2, width),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_alpha": "1"})
    source = load_source(tmp_path / "a.safetensors", pipe)
    assert set(source.token_embeddings) == {"text_encoder.zorb"}
    assert "header alone" in source.notes[0]
    assert float(source.parts["unet"][layer].up[0, 0]) == 0.5
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()


def test_a_header_may_have_any_length(tmp_path):
    """Its first bytes are its length: 640 begins as a pickle does, 60 as a web page, 123 as JSON."""
    for length in range(200, 1400, 8):
        data = save(
            {"unet.x.lora_A.weight": torch.ones(1, 1), "unet.x.lora_B.weight": torch.ones(1, 1)},
            metadata={"format": "pt"},
        )
        header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip().ljust(length)
        path = tmp_path / "file.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header + data[-8:])
        if len(header) == length:
            assert list(read_lora(path).layers) == ["unet.x"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"PK\x03\x04rest of a zip", "pickle"), (b"\x80\x02}q\x00.", "pickle"), (b"<!DOCTYPE html>", "web page"), (b"", "corrupted"),
     (b"abc", "corrupted"),
     (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), ((1 << 62).to_bytes(8, "little") + b"{}", "corrupted")],
)  # fmt: skip
def test_what_is_no_safetensors_is_said(tmp_path, data, words):
    (tmp_path / "file.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_lora(tmp_path / "file.safetensors")
