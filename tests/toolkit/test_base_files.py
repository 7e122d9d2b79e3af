"""Bases in several files, as ComfyUI keeps them: put together, quantised weights as they are meant, named everywhere by one text."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from comfy_files import comfy_base, tensors
from safetensors.torch import load_file, save_file
from tiny_families import SIDE, build

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.base_files import BaseFiles, base_paths, join_base, parse_base, short_base
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.diffusion.quantized_files import dequantize
from rankfold.training.config.subject import SubjectConfig
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
