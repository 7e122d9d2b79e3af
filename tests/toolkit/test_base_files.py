"""Bases in several files, as ComfyUI keeps them: put together, quantised weights as they are meant, named everywhere by one text."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from comfy_files import comfy_base, original_denoiser, quantize, tensors
from safetensors.torch import load_file, save_file
from tiny_families import SIDE, build

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.base_files import BaseFiles, base_paths, join_base, parse_base, short_base
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.diffusion.part_files import PartFile, build_part, read_tensors
from rankfold.toolkit.diffusion.quantized_files import dequantize
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.runs.begin import with_absolute_paths

FAMILIES = ("sd3", "z-image", "qwen-image", "flux2-klein", "krea2")
HERE = Path("model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name -> folder of its tiny pipeline, with an autoencoder whose original names diffusers knows."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def folder(name):
        if name not in made:
            made[name] = build(name, root / name)
            if name in ("qwen-image", "krea2"):
                torch.manual_seed(1)
                vae = diffusers.AutoencoderKLQwenImage(
                    base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, latents_mean=[0.1, -0.2, 0.3, 0.0],
                    latents_std=[1.5, 0.7, 2.0, 1.0],
                )  # fmt: skip
                vae.save_pretrained(made[name] / "vae")
        return made[name]

    return folder


# ---------------------------------------------------------------------------------------------- whole bases


@pytest.mark.parametrize("name", FAMILIES)
def test_files_become_the_pipeline_they_came_from(whole, tmp_path, name):
    """Every tensor of every part, from original names; with the prefix that ComfyUI's own files have, too."""
    folder = whole(name)
    prefix = "model.diffusion_model." if name == "qwen-image" else ""
    same_parts(resolve_base(str(comfy_base(folder, tmp_path / "comfy", prefix=prefix))), folder)


def same_parts(made, folder):
    """Every tensor of every part, to the bit."""
    parts = [part.name for part in folder.iterdir() if any(part.glob("*.safetensors"))]
    assert {"transformer", "vae", "text_encoder"} <= set(parts)
    for part in parts:
        own, there = tensors(Path(made), part), tensors(folder, part)
        assert own.keys() == there.keys()
        for key, value in there.items():
            assert torch.equal(own[key], value), (part, key)


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("sd3", "old"), ("z-image", "new"), ("qwen-image", "rows"), ("krea2", "int8"), ("flux2-klein", "blocks")],
)
def test_quantised_files_are_what_they_mean(whole, tmp_path, name, dialect):
    """The base of quantised files is that of the same weights in floating point: in every tensor, and in an image."""
    folder = whole(name)
    base = comfy_base(folder, tmp_path / "quantised", dialect=dialect)
    plain = comfy_base(folder, tmp_path / "meant", dialect=dialect, meant=True)
    bare, meant = load_file(base.denoiser), load_file(plain.denoiser)
    assert sum(bool((bare[key].to(value.dtype) - value).abs().max() > 1) for key, value in meant.items()) > 5
    same_parts(resolve_base(str(base)), Path(resolve_base(str(plain))))
    recipe = Recipe(prompt="a creature", steps=1, width=SIDE, base=str(base))
    images = [generate(replace(recipe, base=one))[0][0].tobytes() for one in (str(base), str(plain), str(folder))]
    assert images[0] == images[1]
    assert images[0] != images[2]


@pytest.mark.campaign
def test_flux_in_its_released_width(tmp_path):
    """diffusers' converter of FLUX.1 knows no other; one block of each kind, in the files' own dtypes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(tmp_path / "layout/transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "layout/model_index.json").write_text(json.dumps(index))
    written, meant = quantize(original_denoiser(tmp_path / "layout"), "old")
    parts = []
    for state in (written, meant):
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "one.safetensors")
        file = PartFile("transformer", tmp_path / "one.safetensors", read_tensors(tmp_path / "one.safetensors"))
        parts.append(build_part(file, index, tmp_path / "layout").state_dict())
    assert all(torch.equal(parts[0][key], value) for key, value in parts[1].items())
    own = model.state_dict()
    assert all((parts[0][key] - value).abs().max() < 0.1 for key, value in own.items())
    assert parts[0].keys() == own.keys()


def test_a_folder_with_quantised_weights_is_refused(whole, tmp_path):
    """Its loader would leave the scales out; with them out of the way, as files, they count."""
    folder = shutil.copytree(whole("z-image"), tmp_path / "folder")
    (file,) = (folder / "transformer").glob("*.safetensors")
    written, meant = quantize(load_file(file), "new")
    save_file(written, file)
    with pytest.raises(
        UserError, match=r"holds quantised weights with scales .* give that file by --base and the folder by --layout"
    ):
        resolve_base(str(folder))
    own = tensors(Path(resolve_base(f"{file} --layout {folder}")), "transformer")
    assert all(torch.equal(own[name], value) for name, value in meant.items())


# ---------------------------------------------------------------------------------------------- quantised weights


def test_scales_of_every_shape():
    """One number, a number for each row, with and without a second dimension, and one for each block; convolutions by rows."""
    values = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    blocks = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    ways = {
        torch.tensor(0.5): torch.full((4, 6), 0.5),
        torch.tensor([0.5]): torch.full((4, 6), 0.5),
        torch.arange(1.0, 5.0): torch.arange(1.0, 5.0)[:, None].expand(4, 6),
        torch.arange(1.0, 5.0)[:, None]: torch.arange(1.0, 5.0)[:, None].expand(4, 6),
        blocks: blocks.repeat_interleave(2, 0).repeat_interleave(2, 1),
    }
    for scale, whole in ways.items():
        for end in ("scale_weight", "weight_scale", "weight_scale_inv"):
            state = {"a.weight": values, f"a.{end}": scale, "a.bias": torch.ones(4)}
            found = dequantize(state, HERE)
            assert found.keys() == {"a.weight", "a.bias"}
            assert torch.equal(found["a.weight"], values.float() * whole)
    kernel = torch.randint(-9, 9, (4, 2, 3, 3), dtype=torch.int8)
    found = dequantize({"a.weight": kernel, "a.weight_scale": torch.arange(1.0, 5.0)}, HERE)
    want = kernel.float() * torch.arange(1.0, 5.0).view(-1, 1, 1, 1)
    assert torch.equal(found["a.weight"], want.bfloat16())  # where nothing else is in the file


def test_plain_eight_bit_values_are_what_they_say():
    state = {"a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "a.bias": torch.ones(4, dtype=torch.float16)}
    found = dequantize(state, HERE)
    assert torch.equal(found["a.weight"], state["a.weight"].half())


def says(**entry):
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


INT8, FP8 = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("state", "header", "sentence"),
    [
        ({"a.weight": INT8}, {}, "a.weight holds whole numbers .int8. and the file no scale"),
        ({"a.weight": torch.ones(4, 2, dtype=torch.uint8)}, {}, "a.weight holds whole numbers .uint8."),
        ({"a.weight": INT8, "a.SCB": torch.ones(4)}, {}, "a.SCB is of a quantisation that is not read"),
        ({"a.weight": INT8, "a.weight_scale": torch.ones(3)}, {}, "no known way to scale"),
        ({"a.weight": INT8, "a.weight_scale": torch.ones(3, 4)}, {}, "no known way to scale"),
        ({"a.weight": FP8, "a.weight_scale": torch.ones(4, 1, dtype=torch.uint8)}, {}, "in uint8 .* no known way"),
        ({"a.weight_scale": torch.ones(())}, {}, "a scale for a.weight, which is not in it"),
        ({"a.weight": FP8, "a.comfy_quant": says(format="nvfp4")}, {}, "a is quantised as nvfp4"),
        ({"a.weight": INT8, "a.weight_scale": torch.ones(()), "a.comfy_quant": says(format="int8_tensorwise", convrot=True)}, {},
         "int8_tensorwise with convrot"),
        ({"a.weight": FP8}, {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "mxfp8"}}})}, "as mxfp8"),
        ({"a.weight": FP8}, {"_quantization_metadata": "{"}, "is not JSON"),
    ],
)  # fmt: skip
def test_what_is_more_than_values_times_scale_is_refused(state, header, sentence):
    with pytest.raises(UserError, match=rf"(?s){sentence}.*(bf16|complete)"):
        dequantize(state, HERE, header)


# ---------------------------------------------------------------------------------------------- names


def test_names_are_read_as_they_are_written(tmp_path):
    files = BaseFiles("a b.safetensors", "it's.safetensors", ("c.safetensors", "d e.safetensors"), "FLUX.1 dev")
    assert parse_base(str(files)) == files
    assert base_paths(str(files)) == [
        "a b.safetensors",
        "it's.safetensors",
        "c.safetensors",
        "d e.safetensors",
        "FLUX.1 dev",
    ]
    assert short_base(str(replace(files, denoiser="/x/a b.safetensors"))) == "a b.safetensors"
    assert parse_base("some/model") is None
    assert base_paths("tiny") == ["tiny"]
    assert join_base("a.safetensors", None, (), "") == "a.safetensors"
    again = join_base(str(files), tmp_path / "other.safetensors", (), "")
    assert parse_base(again) == replace(files, vae=(tmp_path / "other.safetensors").as_posix())
    for text in ("a --vae", "a --vae b c", "a b --vae c", " --vae c", "a --layout x y", "a --vae 'b"):
        with pytest.raises(UserError, match="--base"):
            parse_base(f"{text} ")


def test_a_config_takes_them_and_makes_their_paths_whole(tmp_path, monkeypatch):
    """From the command line, as keys of a file, and as they are written back; other options stay what they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("t", "v", "e"):
        (tmp_path / f"{name}.safetensors").touch()
    config = SubjectConfig(
        base="t.safetensors", vae=Path("v.safetensors"), text_encoder=(Path("e.safetensors"),), layout="some/model"
    )
    assert config.base == "t.safetensors --vae v.safetensors --text-encoder e.safetensors --layout some/model"
    assert (config.vae, config.text_encoder, config.layout) == (None, (), "")
    whole = parse_base(with_absolute_paths(config).base)
    assert [str(file) for file in whole.files] == [str(tmp_path / f"{name}.safetensors") for name in ("t", "v", "e")]
    assert whole.layout == "some/model"
    (tmp_path / "c.yaml").write_text(
        "base: t.safetensors\nvae: v.safetensors\ntext_encoder: [e.safetensors]\nlayout: some/model\n"
    )
    assert from_yaml(tmp_path / "c.yaml") == config
    (tmp_path / "d.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "d.yaml") == config
    assert replace(config, base="tiny").base == "tiny"


# ---------------------------------------------------------------------------------------------- through the commands


def fails(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_put_together_is_refused(whole, tmp_path, capsys):
    base = comfy_base(whole("sd3"), tmp_path / "comfy")
    other = comfy_base(whole("z-image"), tmp_path / "other")
    sample = ("sample", "--prompt", "x", "--base", base.denoiser)
    rest = ("--vae", base.vae, "--text-encoder", *base.text_encoders)
    layout = ("--layout", base.layout)
    assert "could not be fetched" in (said := fails(capsys, *sample, *rest))
    assert "--layout FOLDER_OR_HUB_ID" in said
    said = fails(capsys, *sample, *layout)
    assert all(f"{name} (" in said for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    assert "name files with --vae and --text-encoder" in said
    said = fails(capsys, *sample, "--vae", base.vae, "--text-encoder", *base.text_encoders[:2], *layout)
    assert "has no text_encoder_3 (T5EncoderModel), and" in said
    said = fails(capsys, *sample, *rest, other.text_encoders[0], *layout)
    assert "is a language model of width 16, and the base takes no other" in said
    said = fails(capsys, *sample, "--vae", base.denoiser, *rest[2:], *layout)
    assert "is no AutoencoderKL as the configs in" in said
    said = fails(capsys, "sample", "--prompt", "x", "--base", other.denoiser, *rest, *layout)
    assert "is no SD3Transformer2DModel" in said
    assert "--vae nowhere.safetensors is no file" in fails(capsys, *sample, "--vae", "nowhere.safetensors", *layout)
    assert "--base tiny is no file" in fails(capsys, "sample", "--prompt", "x", "--base", "tiny", "--vae", base.vae)
    assert "--vae belongs to --base FILE" in fails(capsys, "sample", "--prompt", "x", "--vae", base.vae)
    assert "has no model_index.json" in fails(capsys, *sample, "--layout", tmp_path)
    assert not list(Path(os.environ["RANKFOLD_CACHE"]).glob("bases/*.part"))


def test_a_run_keeps_all_files_of_its_base(whole, photos, tmp_path, monkeypatch, capsys):
    """Trained from relative names in a queue's way, resumed, drawn, evaluated and exported from elsewhere; a changed file is named."""
    base = comfy_base(whole("z-image"), tmp_path / "comfy", dialect="old")
    monkeypatch.chdir(tmp_path / "comfy")
    names = (
        "--base",
        "transformer.safetensors",
        "--vae",
        "vae.safetensors",
        "--text-encoder",
        "text_encoder.safetensors",
        "--layout",
        "layout",
    )
    run, short = (
        tmp_path / "run",
        (
            "--resolution",
            SIDE,
            "--batch-size",
            2,
            "--rank",
            4,
            "--preview-every",
            0,
            "--threads",
            1,
            "--learning-rate",
            0.01,
        ),
    )
    main(
        [
            str(word)
            for word in (
                "train",
                "subject",
                "--images",
                photos,
                *names,
                "--class-noun",
                "creature",
                "--out",
                run,
                "--steps",
                1,
                *short,
            )
        ]
    )
    assert from_yaml(run / "config.yaml").base == str(base)
    monkeypatch.chdir(tmp_path)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 1\n", "steps: 2\n"))
    main(["resume", str(run)])
    main(["sample", "--run", str(run), "--steps", "1", "--width", str(SIDE), "--out", str(tmp_path / "drawn")])
    (drawn,) = (tmp_path / "drawn").iterdir()
    main(["sample", "--from", str(drawn), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / drawn.name).read_bytes() == drawn.read_bytes()
    main(["export", str(run)])
    file = Path(base.denoiser)
    state = load_file(file)
    save_file(
        {
            name: value + 1 if name.endswith("bias") and value.is_floating_point() else value
            for name, value in state.items()
        },
        file,
    )
    (run / "config.yaml").write_text(config.replace("steps: 1\n", "steps: 3\n"))
    assert "the base's transformer" in fails(capsys, "resume", run)
