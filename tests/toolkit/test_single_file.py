"""Checkpoints in one file: the layouts that A1111 and ComfyUI keep are turned back into the pipeline they came from."""

import json
import shutil

import pytest
import torch
from comfy_files import original_vae, quantize, tensors, vae_name
from safetensors.torch import load_file, save_file
from tiny_families import build

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.hub import CONFIGS
from rankfold.toolkit.diffusion import single_file
from rankfold.toolkit.diffusion.load import resolve_base

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name, layers):
    """The original layout's name of a UNet tensor, for UNets with so many ResNets a block."""
    words = name.split(".")
    if words[0] == "mid_block":
        place = f"middle_block.{2 * int(words[2]) if words[1] == 'resnets' else 1}"
        kind, rest = words[1], words[3:]
    elif words[0] in ("down_blocks", "up_blocks"):
        block, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
        if words[0] == "down_blocks":
            at = f"input_blocks.{(layers + 1) * block + 1 + (layers if kind == 'downsamplers' else number)}"
            place = f"{at}.{1 if kind == 'attentions' else 0}"
            rest = ["op", *rest[1:]] if kind == "downsamplers" else rest
        else:
            at = f"output_blocks.{(layers + 1) * block + (layers if kind == 'upsamplers' else number)}"
            place = f"{at}.{ {'resnets': 0, 'attentions': 1, 'upsamplers': 2}[kind] }"
    else:
        end = next(end for end in UNET_ENDS if name.startswith(f"{end}."))
        return UNET_ENDS[end] + name.removeprefix(end)
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def original(folder):
    """All tensors of a Stable Diffusion folder under their original names."""
    layers = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))["layers_per_block"]
    blocks = len(json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))["block_out_channels"])
    state = {f"model.diffusion_model.{unet_name(k, layers)}": v for k, v in tensors(folder, "unet").items()}
    for name, value in tensors(folder, "vae").items():
        theirs = vae_name(name, blocks)
        square = ".attn_1." in theirs and value.dim() == 2  # 1 x 1 convolutions there, linear layers here
        state[f"first_stage_model.{theirs}"] = value[..., None, None] if square else value
    for name, value in tensors(folder, "text_encoder").items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in state.items()}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return build("sd", tmp_path_factory.mktemp("single") / "sd")


@pytest.fixture
def checkpoint(base_folder, tmp_path):
    save_file(original(base_folder), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def layout(base_folder, tmp_path):
    """Configs and tokenizers alone."""
    return shutil.copytree(base_folder, tmp_path / "layout", ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_checkpoint_becomes_its_pipeline(checkpoint, layout, base_folder, tmp_path, capsys):
    main(["convert-base", str(checkpoint), "--layout", str(layout), "--out", str(tmp_path / "made")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "made")
    for part in ("unet", "vae", "text_encoder"):
        made, there = tensors(tmp_path / "made", part), tensors(base_folder, part)
        assert made.keys() == there.keys()
        assert all(torch.equal(made[name], there[name]) for name in there)
    ours, theirs = (
        Recipe(prompt="a creature", base=str(f), steps=2, width=32) for f in (tmp_path / "made", base_folder)
    )
    assert generate(ours)[0][0].tobytes() == generate(theirs)[0][0].tobytes()


def test_quantised_weights_of_a_checkpoint_are_what_they_mean(checkpoint, layout, base_folder, tmp_path):
    """And an autoencoder of another file takes the place of the checkpoint's own."""
    written, meant = quantize(load_file(checkpoint), "old")
    made = []
    for name, state in (("written", written), ("meant", meant)):
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
        made.append(single_file.convert(tmp_path / f"{name}.safetensors", str(layout), tmp_path / name))
    for part in ("unet", "vae", "text_encoder"):
        own, there, before = (tensors(folder, part) for folder in (*made, base_folder))
        assert all(torch.equal(own[key], there[key]) for key in there)
        assert part == "vae" or any(not torch.equal(own[key], before[key]) for key in before)
    assert not list(tmp_path.glob("written/dequantized*"))
    other = {name: value + 1 for name, value in original_vae(base_folder).items()}
    save_file(other, tmp_path / "vae.safetensors")
    own = tensors(single_file.convert(checkpoint, str(layout), tmp_path / "other", tmp_path / "vae.safetensors"), "vae")
    assert all(torch.equal(own[key], value + 1) for key, value in tensors(base_folder, "vae").items())


def test_a_checkpoint_is_a_base(checkpoint, layout, tmp_path, monkeypatch):
    """--base takes the file itself; it is turned into a folder once, until it changes."""
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(single_file, "layout_folder", lambda file, state, _: layout)
    first = resolve_base(str(checkpoint))
    monkeypatch.setattr(single_file, "read_single_file", lambda file: pytest.fail("converted again"))
    assert resolve_base(str(checkpoint)) == first
    checkpoint.touch()
    with pytest.raises(BaseException, match="converted again"):
        resolve_base(str(checkpoint))


def test_a_transformer_alone_takes_the_rest_from_the_layout(tmp_path):
    folder = build("flux-dev", tmp_path / "flux")
    state = {k: v + 1 for k, v in tensors(folder, "transformer").items()}
    save_file(state, tmp_path / "transformer.safetensors")
    made = single_file.convert(tmp_path / "transformer.safetensors", str(folder), tmp_path / "made")
    assert all(torch.equal(value, state[name]) for name, value in tensors(made, "transformer").items())
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert (made / part / "config.json").read_bytes() == (folder / part / "config.json").read_bytes()
    assert resolve_base(str(made)) == str(made)


def clip_and_vae(folder):
    """Such names as a file has that comes with the CLIP encoders and without T5."""
    return dict.fromkeys(("text_encoders.clip_l.x", "text_encoders.clip_g.x", "first_stage_model.x", "model.x"))


@pytest.mark.parametrize(
    ("family", "state", "fetched"),
    [
        ("sd", original, []),
        ("sd3", clip_and_vae, ["text_encoder_3"]),
        (
            "sd3",
            lambda folder: {"model.diffusion_model.x": None},
            ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"],
        ),
        ("flux-dev", lambda folder: tensors(folder, "transformer"), ["text_encoder", "text_encoder_2", "vae"]),
    ],
)
def test_weights_are_fetched_for_the_parts_that_a_file_lacks(tmp_path, monkeypatch, family, state, fetched):
    """Configs first, which say what the parts are; never the denoiser's weights, which are what the file has."""
    folder, asked = build(family, tmp_path / family), []
    monkeypatch.setattr(
        single_file, "fetch_snapshot", lambda name, patterns, *words: asked.append(patterns) or str(folder)
    )
    assert single_file.layout_folder(tmp_path / "one.safetensors", state(folder), "some/layout") == folder
    weights = [pattern for pattern in asked[-1] if pattern.endswith(".safetensors")]
    assert sorted(weights) == [f"{part}/*.safetensors" for part in fetched]
    assert asked[0] == CONFIGS


def test_what_cannot_be_converted(checkpoint, layout, base_folder, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        single_file.convert(tmp_path / "torn.safetensors", str(layout), tmp_path / "made")
    with pytest.raises(UserError, match="has no model_index"):
        single_file.convert(checkpoint, str(tmp_path), tmp_path / "made")
    with pytest.raises(UserError, match=r"stable-diffusion-v1-5.* could not be fetched .* --layout FOLDER_OR_HUB_ID"):
        single_file.convert(checkpoint, None, tmp_path / "made")
    other = build("sdxl", tmp_path / "xl")
    with pytest.raises(UserError, match="does not fit the layout of"):
        single_file.convert(checkpoint, str(other), tmp_path / "made")
    with pytest.raises(UserError, match="is not empty"):
        single_file.convert(checkpoint, str(layout), base_folder)
    torn = {name: value for name, value in original(base_folder).items() if "output_blocks.0.0" not in name}
    save_file(torn, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="does not"):
        single_file.convert(tmp_path / "less.safetensors", str(layout), tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "made.part").exists()
