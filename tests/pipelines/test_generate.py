"""Sampling and export on a real pipeline with a really trained adapter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from settings import quick_config

from rankfold.apps.cli import main
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.fuse import fuse_adapters
from rankfold.pipelines.generate import (
    Recipe,
    denoise,
    generate,
    load_pipeline,
    read_recipe,
    repeat,
    sampling_pipeline,
    save_image,
)
from rankfold.pipelines.place import place_on_device, weight_bytes
from rankfold.pipelines.regions import parse_region, region_masks
from rankfold.pipelines.scheduler import make_scheduler
from rankfold.pipelines.unused import unused_in_recipe
from rankfold.toolkit.adapters.attach import adapter_layers, attach
from rankfold.toolkit.adapters.registry import adapter_names, make_config
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.load import open_model


@pytest.fixture(scope="module")
def trained(base, images, tmp_path_factory):
    """A run with adapters on the denoiser and the text encoder, alpha not equal to rank."""
    import os

    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    os.environ["RANKFOLD_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=out,
            steps=12,
            batch_size=2,
            rank=4,
            alpha=8.0,
            learning_rate=0.01,
            train_text_encoder=True,
            preview_every=0,
            threads=1,
        )
    )


def recipe_for(trained, base, **changes):
    recipe = Recipe(
        prompt="a sks creature", base=str(base), adapters=(str(trained.adapter),), strengths=(1.0,), steps=4
    )
    return replace(recipe, **changes)


def test_diffusers_file_loads_with_nothing_but_diffusers(trained, base, tmp_path):
    """A separate process that never imports rankfold gets the same image."""
    import subprocess
    import sys

    path = export_adapter(trained.adapter, str(base), "diffusers", tmp_path).path
    code = f"""
import numpy, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained({str(base)!r}, safety_checker=None)
pipe.load_lora_weights({str(tmp_path)!r}, weight_name={path.name!r})
latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
image = pipe("a sks creature", latents=latents, num_inference_steps=3, output_type="np").images
numpy.save({str(tmp_path / "there.npy")!r}, image)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    pipe = load_pipeline(recipe_for(trained, base))
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
    here = pipe("a sks creature", latents=latents, num_inference_steps=3, output_type="np").images
    assert np.abs(here - np.load(tmp_path / "there.npy")).max() < 1e-5


def test_headers_say_alpha_is_rank(trained, base, tmp_path):
    path = export_adapter(trained.adapter, str(base), "kohya", tmp_path).path
    with safe_open(path, "pt") as file:
        alphas = [file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
        assert file.metadata()["modelspec.trigger_phrase"] == "sks creature"
    assert alphas
    assert set(alphas) == {4.0}


def test_a_image_repeats_exactly(trained, base, tmp_path):
    made = generate(recipe_for(trained, base, seed=3), n=3)
    save_image(tmp_path / "a.png", *made[1])
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe.seed == 4
    image, _ = repeat(recipe)
    assert image.tobytes() == Image.open(tmp_path / "a.png").tobytes()


def test_a_changed_adapter_cannot_repeat(trained, base, tmp_path):
    import shutil

    copy = tmp_path / "adapter"
    shutil.copytree(trained.adapter, copy)
    made = generate(recipe_for(trained, base, adapters=(str(copy),)), n=1)
    save_image(tmp_path / "a.png", *made[0])
    weights = copy / "unet" / "adapter_config.json"
    weights.write_text(weights.read_text(encoding="utf-8") + " ")
    with pytest.raises(UserError, match="has changed since"):
        read_recipe(tmp_path / "a.png")


def test_strength_zero_is_the_base_and_strength_matters(trained, base):
    plain = generate(recipe_for(trained, base, adapters=(), strengths=()))[0][0]
    off = generate(recipe_for(trained, base, strengths=(0.0,)))[0][0]
    half = generate(recipe_for(trained, base, strengths=(0.5,)))[0][0]
    assert off.tobytes() == plain.tobytes()
    assert half.tobytes() != plain.tobytes()


def test_sampling_fuses_what_can_be_fused(trained, base):
    """Linear adapters are put into the weights and gone; the image is the same but for rounding."""
    recipe = recipe_for(trained, base, adapters=(str(trained.adapter),) * 2, strengths=(0.5, 0.7))
    apart, fused = load_pipeline(recipe), sampling_pipeline(recipe)
    assert adapter_layers(apart.unet)
    assert not adapter_layers(fused.unet)
    assert not adapter_layers(fused.text_encoder)
    first, second = (np.asarray(generate(recipe, pipe=pipe)[0][0], dtype=int) for pipe in (apart, fused))
    plain = np.asarray(generate(replace(recipe, adapters=(), strengths=()))[0][0], dtype=int)
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - plain).max() > 20


@pytest.mark.parametrize(
    ("adapter", "dtype"), [("fvae", torch.float32), ("loratrf", torch.float32), ("lora", torch.bfloat16)]
)
def test_sampling_leaves_what_cannot_be_fused(base, adapter, dtype):
    """What is not linear has no weight, and half precision would round the change away."""
    pipe = load_pipeline(Recipe(prompt="", base=str(base)))
    pipe.unet.to(dtype)
    attach(pipe.unet, make_config(adapter, rank=4, alpha=4.0, dropout=0.0, target_modules=("to_q",), options={}))
    pipe.unet.requires_grad_(False).eval()
    before = len(adapter_layers(pipe.unet))
    assert before > 0
    assert len(adapter_layers(fuse_adapters(pipe).unet)) == before


def test_images_need_not_be_square(trained, base, tmp_path):
    recipe = recipe_for(trained, base, width=48, height=72)
    made = generate(recipe)
    save_image(tmp_path / "a.png", *made[0])
    assert made[0][0].size == (48, 72)
    again, _ = repeat(read_recipe(tmp_path / "a.png"))
    assert again.tobytes() == made[0][0].tobytes()
    left = ("a sks creature", 0, 0, 0.5, 1)
    assert generate(replace(recipe, regions=(left,)))[0][0].size == (48, 72)
    with pytest.raises(UserError, match=r"--height 70 cannot be divided by 8.* take 72"):
        generate(replace(recipe, height=70))


def test_two_adapters_at_once(trained, base):
    both = recipe_for(trained, base, adapters=(str(trained.adapter),) * 2, strengths=(0.5, 0.5))
    one = generate(recipe_for(trained, base))[0][0]
    two = generate(both)[0][0]
    difference = max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True))
    assert difference <= 1


@pytest.mark.parametrize("format", ["diffusers", "kohya", "kohya-full"])
def test_files_of_any_origin_are_adapters(format, trained, base, tmp_path):
    """A file makes the image of the run it was exported from, at any strength, and is read only once."""
    file = export_adapter(trained.adapter, str(base), format, tmp_path).path
    recipe = recipe_for(trained, base, adapters=(str(file),), strengths=(0.7,), steps=2)
    ours = generate(recipe_for(trained, base, strengths=(0.7,), steps=2))[0][0]
    theirs, own = generate(recipe)[0]
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max()
    assert difference <= 1
    assert own.hashes != ()
    again = generate(recipe)[0][0]
    assert again.tobytes() == theirs.tobytes()


def test_a_kohya_file_whose_layers_differ_in_rank(base, images, tmp_path):
    """diffusers reads it as it is meant: the proof, which is its image, says so."""
    from safetensors.torch import load_file

    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    run = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "run",
            steps=4,
            batch_size=2,
            rank=4,
            adapter="dora",
            learning_rate=0.02,
            preview_every=0,
            threads=1,
        )
    )
    proof = export_adapter(run.adapter, str(base), "kohya", tmp_path, max_error=0.3)
    assert proof.ranks is not None
    assert proof.ranks[0] < proof.ranks[1]
    assert proof.weight_error < 1e-5
    alphas = {float(v) for k, v in load_file(proof.path).items() if k.endswith(".alpha")}
    assert len(alphas) == 1


def test_a_file_of_another_base_is_refused(trained, base, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    names = ("unet.nothing.here.lora_A.weight", "unet.nothing.here.lora_B.weight")
    save_file({names[0]: torch.ones(2, 8), names[1]: torch.ones(8, 2)}, file)
    with pytest.raises(UserError, match="made for another base model"):
        load_pipeline(recipe_for(trained, base, adapters=(str(file),)))


def test_images_that_are_no_numbers_are_refused(trained, base):
    recipe = recipe_for(trained, base, adapters=(), strengths=(), steps=1)
    pipe = load_pipeline(recipe)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinity: take --precision fp32"):
        generate(recipe, pipe=pipe)


def test_prior_is_free_of_the_adapter(trained, base):
    """The library call takes any stock pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = denoise(pipe, ["a creature"], seeds=[0], steps=2, guidance_scale=4.0, width=64)
    assert images[0].size == (64, 64)


def test_sample_command(trained, base, tmp_path, capsys):
    out = tmp_path / "s"
    main(["sample", "--run", str(trained.folder), "--prompt", "a sks creature", "--n", "2", "--strength", "0.8",
          "--seed", "1", "--steps", "2", "--grid", "--out", str(out)])  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["000001.png", "000002.png", "grid.png"]
    first = (out / "000002.png").read_bytes()
    main(["sample", "--from", str(out / "000002.png"), "--out", str(tmp_path / "t")])
    assert (tmp_path / "t" / "000002.png").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheduler": "NoSuch"}, "not a scheduler"),
        ({"steps": 0}, "--steps"),
        ({"strengths": ()}, "strengths"),
        ({"adapters": ("nowhere",)}, "does not exist: give a run folder, an adapter folder or a LoRA file"),
    ],
)
def test_recipe_mistakes(trained, base, changes, words):
    with pytest.raises(UserError, match=words):
        load_pipeline(recipe_for(trained, base, **changes))


def test_a_plain_png_has_no_recipe(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="carries no settings"):
        read_recipe(tmp_path / "a.png")


@pytest.mark.parametrize("adapter", adapter_names())
def test_every_adapter_makes_images(adapter, base, images, tmp_path):
    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    run = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "run",
            steps=2,
            batch_size=2,
            rank=4,
            adapter=adapter,
            alpha=4.0,
            preview_every=0,
            threads=1,
        )
    )
    assert len(generate(recipe_for(run, base, steps=2))) == 1
    if adapter == "oft":
        with pytest.raises(UserError, match="no strength but 1"):
            load_pipeline(recipe_for(run, base, strengths=(0.5,)))
    else:
        off, strong = (generate(recipe_for(run, base, steps=2, strengths=(s,)))[0][0].tobytes() for s in (0.0, 8.0))
        assert off != strong


def test_one_region_over_everything_is_the_plain_image(trained, base):
    plain = generate(recipe_for(trained, base, seed=3))[0][0]
    regions = (("a sks creature", 0.0, 0.0, 1.0, 1.0),)
    whole = generate(recipe_for(trained, base, seed=3, prompt="", regions=regions))[0][0]
    assert np.abs(np.asarray(plain, float) - np.asarray(whole, float)).max() <= 1


def test_regions_keep_to_their_places_and_repeat(trained, base, tmp_path):
    both = [str(trained.adapter)] * 2
    words = [
        "sample",
        "--base",
        str(base),
        "--adapters",
        *both,
        "--strength",
        "1",
        "0",
        "--steps",
        "4",
        "--out",
        str(tmp_path),
    ]
    texts = ["left: a sks creature", "right: a sks creature"]
    main([*words, "--regions", *texts])
    first = tmp_path / "000000.png"
    before = first.read_bytes()
    main(["sample", "--from", str(first), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "000000.png").read_bytes() == before
    shares = region_masks([parse_region(text) for text in texts], 8, 8)
    assert torch.allclose(shares.sum(0), torch.ones(1, 8, 8))
    assert shares[0, 0, :, :3].min() > 0.99
    assert shares[0, 0, :, 5:].max() < 0.01


@pytest.mark.parametrize("text", ["left a creature", "middle: a creature", "0,0,2,1: a creature", "left:  "])
def test_a_region_that_is_none(text):
    with pytest.raises(UserError, match="--regions"):
        parse_region(text)


def test_as_many_regions_as_adapters(trained, base):
    with pytest.raises(UserError, match="as many regions"):
        load_pipeline(recipe_for(trained, base, regions=(("a", 0, 0, 1, 1),) * 2))


@pytest.mark.parametrize("regions", [(), (("left", 0, 0, 0.5, 1), ("right", 0.5, 0, 1, 1))])
def test_parts_that_come_while_they_are_at_work(trained, base, regions):
    """A pipeline too large for the free memory is moved part by part, and draws the same image, more than once."""
    adapters = (str(trained.adapter),) * len(regions or "1")
    recipe = recipe_for(trained, base, adapters=adapters, strengths=(1.0,) * len(adapters), regions=regions)
    expected = generate(recipe)[0][0].tobytes()
    pipe = sampling_pipeline(recipe)
    size = weight_bytes(pipe)
    assert not hasattr(place_on_device(pipe, torch.device("cpu"), 2 * size).unet, "_hf_hook")
    pipe = place_on_device(pipe, torch.device("cpu"), size)
    assert all(hasattr(part, "_hf_hook") for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    for _ in range(2):
        assert generate(recipe, pipe=pipe)[0][0].tobytes() == expected
        assert "new_forward" in str(vars(pipe.unet)["forward"])


def test_strengths_leave_no_other_adapter_active(trained, base, images, tmp_path):
    """One adapter has a part on the text encoder, the other has none: with the other alone, the text encoder is the base's."""
    from rankfold.toolkit.formats import native
    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    bare = train(
        quick_config(
            SubjectConfig,
            base=str(base),
            images=images,
            out=tmp_path / "run",
            steps=1,
            batch_size=2,
            preview_every=0,
            threads=1,
        )
    )
    both = (str(trained.adapter), str(bare.adapter))
    pipe = load_pipeline(recipe_for(trained, base, adapters=both, strengths=(1.0, 1.0)))
    plain = load_pipeline(recipe_for(trained, base, adapters=(), strengths=()))

    def states(of):
        return of.encode_prompt("a sks creature", "cpu", 1, False)[0]

    native.set_strengths(pipe, {"adapter_1": 1.0})
    assert torch.equal(states(pipe), states(plain))
    native.set_strengths(pipe, {"adapter_0": 1.0})
    assert not torch.equal(states(pipe), states(plain))


def test_schedulers_of_the_base_own_formulation(folders):
    """Another's makes noise of a model without a word, or ends in diffusers with an AttributeError."""
    noise, flow = (open_model(str(folders(name))) for name in ("sd", "sd3"))
    assert type(make_scheduler(noise, "EulerDiscreteScheduler")).__name__ == "EulerDiscreteScheduler"
    assert type(make_scheduler(flow, "FlowMatchLCMScheduler")).__name__ == "FlowMatchLCMScheduler"
    assert type(make_scheduler(flow, "FlowMatchHeunDiscreteScheduler")).__name__ == "FlowMatchHeunDiscreteScheduler"
    with pytest.raises(UserError, match="does not work with FLUX"):
        make_scheduler(open_model(str(folders("flux-dev"))), "FlowMatchHeunDiscreteScheduler")
    assert type(make_scheduler(flow, "")) is type(make_scheduler(flow, "FlowMatchEulerDiscreteScheduler"))
    for base, name in ((noise, "FlowMatchEulerDiscreteScheduler"), (flow, "DDIMScheduler")):
        with pytest.raises(UserError, match=f"--scheduler {name} does not work with"):
            load_pipeline(Recipe(prompt="x", base=base.path, scheduler=name))
    with pytest.raises(UserError, match="is not a scheduler of diffusers"):
        load_pipeline(Recipe(prompt="x", base=noise.path, scheduler="UNet2DModel"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "x", "--strength", "0.5"], "--strength says how strong adapters are"),
        (["--run", "RUN", "--prompt", "x", "--regions", "left: y"], "--prompt has no effect with --regions"),
        (["--from", "a.png", "--seed", "3", "--out", "o"], "so --seed would have no effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(trained, words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", *(str(trained.folder) if word == "RUN" else word for word in words)])
    assert sentence in capsys.readouterr().err


def test_what_has_no_effect_is_named(trained, base, folders):
    plain = Recipe(prompt="x", base=str(base), negative_prompt="blue", guidance_scale=4.0)
    assert not unused_in_recipe(plain)
    [note] = unused_in_recipe(replace(plain, guidance_scale=1.0))
    assert "guidance is off" in note
    [note] = unused_in_recipe(replace(plain, base=str(folders("flux-dev"))))
    assert "FLUX.1 takes none" in note
    adapters = (str(trained.adapter), str(trained.folder))
    [note] = unused_in_recipe(replace(plain, adapters=adapters, strengths=(1.0, 1.0)))
    assert "given 2 times" in note
    subjects = replace(plain, adapters=adapters, strengths=(1.0, 1.0), prompt="{subjects}")
    [where] = unused_in_recipe(replace(subjects, subjects=("sks creature", "small SKS creature")))
    assert "side by side, from the left: sks creature, small SKS creature" in where
    note, _ = unused_in_recipe(replace(subjects, subjects=("sks creature", "red dog")))
    assert "was trained for 'sks creature', and 'red dog' does not say it" in note
