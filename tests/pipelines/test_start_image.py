"""Images made from another one, held to diffusers' own pipelines, loaded by their own names."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import SIDE, build

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, generate, load_pipeline, read_recipe, repeat, save_image
from rankfold.pipelines.start_image import start_pipeline_class
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.randomness import generator
from rankfold.toolkit.embedded import world

STOCK = {  # family -> the pipelines as diffusers' documentation names them
    "sd": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux-dev": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}  # fmt: skip


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A drawing and a mask of its left half."""
    folder = tmp_path_factory.mktemp("photo")
    [(image, _)] = world.subject_images(2_000_011, 1)
    image.resize((SIDE, SIDE)).save(folder / "photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "photo.png", folder / "mask.png"


def stock_image(folder, kind, photo, mask):
    """The same image by the pipeline of that name, as its documentation calls it."""
    pipe = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None) if "StableDiffusionI" in kind else getattr(
        diffusers, kind
    ).from_pretrained(folder)  # fmt: skip
    pipe.scheduler = load_pipeline(Recipe(prompt="", base=str(folder))).scheduler
    pipe.set_progress_bar_config(disable=True)
    more = {"mask_image": Image.open(mask)} if mask else {}
    if mask or "Flux" in kind or "3" in kind:
        more |= {"width": SIDE, "height": SIDE}
    with torch.no_grad():
        return pipe(
            "a sks creature", image=Image.open(photo).convert("RGB"), strength=0.5, num_inference_steps=4, guidance_scale=2.0,
            negative_prompt="", generator=generator(3, 101), **more,
        ).images[0]  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_it_is_the_stock_pipelines_image(name, photo, tmp_path):
    folder, (image, mask) = build(name, tmp_path / name), photo
    own = Recipe(
        prompt="a sks creature", base=str(folder), image=str(image), image_strength=0.5, steps=4, guidance_scale=2.0, width=SIDE,
        seed=3,
    )  # fmt: skip
    plain = np.asarray(generate(replace(own, image=""))[0][0], int)
    for kind, where in zip(STOCK[name], ("", str(mask)), strict=True):
        [(made, recipe)] = generate(replace(own, mask=where))
        expected = np.asarray(stock_image(folder, kind, image, where), int)
        assert np.abs(np.asarray(made, int) - expected).max() <= 1, kind
        assert np.abs(expected - plain).max() > 2
    save_image(tmp_path / "made.png", made, recipe)
    assert repeat(read_recipe(tmp_path / "made.png"))[0].tobytes() == made.tobytes()


def test_several_are_each_as_if_alone_and_in_the_images_shape(base, photo, tmp_path):
    wide = tmp_path / "wide.png"
    Image.open(photo[0]).convert("RGB").resize((96, 48)).save(wide)
    own = Recipe(prompt="x", base=str(base), image=str(wide), steps=4, width=64, seed=5)
    both = generate(own, 2)
    assert [image.size for image, _ in both] == [(64, 32)] * 2
    assert np.abs(np.asarray(both[1][0], int) - np.asarray(generate(replace(own, seed=6))[0][0], int)).max() <= 1
    trained = replace(own, base="tiny", prompt="a creature")
    kept = np.asarray(generate(replace(trained, image_strength=0.3))[0][0], float)
    far = np.asarray(generate(replace(trained, image_strength=1.0))[0][0], float)
    plain = np.asarray(Image.open(wide).resize((64, 32)), float)
    assert np.abs(kept - plain).mean() < np.abs(far - plain).mean()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mask", "MASK"], "give the image, too"),
        (["--image-strength", "0.5"], "give the image, too"),
        (["--image", "nowhere.png"], "does not exist"),
        (["--image", "PHOTO", "--image-strength", "0"], "must be above 0"),
        (["--image", "PHOTO", "--image-strength", "0.1", "--steps", "5"], "leaves no step"),
        (["--image", "PHOTO", "--reference", "PHOTO"], "leave one of the two out"),
        (["--image", "PHOTO", "--mask", "SMALL"], "another size"),
        (["--image", "PHOTO", "--base", "LUMINA"], "no pipeline that makes images from an image"),
        (["--image", "PHOTO", "--mask", "MASK"], "takes denoisers of 4 or 9 input channels, and this base's has 24"),
        (
            ["--image", "PHOTO", "--mask", "MASK", "--base", "tiny-dit"],
            "takes denoisers of 16 or 33 input channels, and this base's has",
        ),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(words, sentence, photo, lumina, tmp_path, capsys, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    places = {"PHOTO": photo[0], "MASK": photo[1], "SMALL": tmp_path / "small.png", "LUMINA": lumina}
    given = [str(places.get(word, word)) for word in words]
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--prompt", "x", "--out", str(tmp_path / "out"), *given])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def lumina(tmp_path_factory):
    return build("lumina2", tmp_path_factory.mktemp("lumina") / "lumina_2")


def test_families_without_such_a_pipeline_are_known():
    able = {name: [bool(start_pipeline_class(name, masked=masked)) for masked in (False, True)] for name in (
        "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "Lumina2Pipeline", "FluxKontextPipeline", "Flux2KleinPipeline",
        "Flux2Pipeline",
    )}  # fmt: skip
    assert able == {
        "QwenImagePipeline": [True, True], "ZImagePipeline": [True, True], "SanaPipeline": [False, False],
        "Lumina2Pipeline": [False, False], "FluxKontextPipeline": [False, False], "Flux2KleinPipeline": [False, False],
        "Flux2Pipeline": [False, False],
    }  # fmt: skip


def test_errors_are_sentences_of_a_recipe_too(base, photo):
    with pytest.raises(UserError, match="--image-strength must be above 0"):
        generate(Recipe(prompt="x", base=str(base), image=str(photo[0]), image_strength=2.0))
