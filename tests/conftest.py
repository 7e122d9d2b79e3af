"""Fixtures: a real Stable Diffusion pipeline with random weights, images of a creature, a cache of their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a StableDiffusionPipeline with the embedded architecture and random weights."""
    from diffusers import StableDiffusionPipeline

    from rankfold.toolkit.embedded import tiny_sd as tiny

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.make_tokenizer()
    StableDiffusionPipeline(
        vae=tiny.make_vae(),
        text_encoder=tiny.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny.make_unet(),
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folder with five images of one creature."""
    from rankfold.toolkit.embedded import world

    folder = tmp_path_factory.mktemp("images")
    for number, (image, _) in enumerate(world.subject_images(4_000_000, 5)):
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache that all tests share and no user sees."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("RANKFOLD_CACHE", str(folder))
    return folder


@pytest.fixture
def config(base, images, tmp_path):
    """A short run."""
    from settings import quick_config

    from rankfold.training.config.subject import SubjectConfig

    return quick_config(
        SubjectConfig, base=str(base), images=images, out=tmp_path / "run", steps=6, batch_size=2, rank=4, alpha=4.0,
        log_every=2, checkpoint_every=2, preview_every=0, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> folder of its tiny pipeline, built when first asked for."""
    from tiny_families import build

    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = build(name, root / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder with three images of a creature, in the size of the tiny families."""
    from tiny_families import SIDE

    from rankfold.toolkit.embedded import world

    root = tmp_path_factory.mktemp("photos")
    for number, (image, _) in enumerate(world.subject_images(2_000_700, 3)):
        image.resize((SIDE, SIDE)).save(root / f"{number}.png")
    return root
