"""A word of its own for the subject: learned, resumed, sampled, composed, and read by stock diffusers."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from safetensors.torch import load_file
from settings import quick_config
from short_runs import train_until
from tiny_families import SIDE

from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, generate, load_pipeline
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.textual_inversion import FILE, load_token_embeddings
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.start import compose, preflight, resume, train
from rankfold.training.subject.task import SubjectTask

PROMPT = "a <sks> creature on the beach"


@pytest.fixture
def config(base, images, tmp_path):
    return quick_config(
        SubjectConfig,
        base=str(base),
        images=images,
        out=tmp_path / "run",
        steps=4,
        batch_size=2,
        learning_rate=0.02,
        preview_every=0,
        threads=1,
        token="<sks>",
        num_vectors=2,
        prior_weight=0.0,
    )


def test_only_the_words_own_vectors_learn(config):
    task = SubjectTask(config, find_samples(config.images), config.base, Accelerator(cpu=True))
    word, encoder = task.trainable.inversions["text_encoder"], task.training.parts["text_encoder"]
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["embeddings.token_embedding.vectors"]
    assert word.vectors.shape[0] == 2
    task.module(task.batch(0, [0, 1])).mean().backward()
    assert (word.vectors.grad.abs().amax(1) > 0).all()
    with torch.no_grad():  # what prompts without it mean is untouched
        before = task.training.model.encode_prompts(["a creature"])["prompt_embeds"]
        told = task.training.model.encode_prompts([PROMPT])["prompt_embeds"]
        word.vectors += 1
        assert torch.equal(task.training.model.encode_prompts(["a creature"])["prompt_embeds"], before)
        assert not torch.equal(task.training.model.encode_prompts([PROMPT])["prompt_embeds"], told)


@pytest.mark.parametrize("text", [False, True])
def test_a_word_is_trained_and_resumed(config, tmp_path, text):
    config = replace(config, train_text_encoder=text)
    whole = train(replace(config, out=tmp_path / "whole"))
    part = train_until(replace(config, out=tmp_path / "part"), 2)
    resume(part.folder)
    words = load_token_embeddings(whole.adapter)
    assert words["text_encoder.<sks>"].shape[0] == 2
    assert words["text_encoder.<sks>"].std(0).max() > 1e-4  # they began alike
    for path in whole.adapter.rglob("*.safetensors"):
        other = load_file(part.adapter / path.relative_to(whole.adapter))
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items()), path.name


def test_stock_diffusers_reads_word_and_adapter(config, base, tmp_path):
    """A separate process that never imports rankfold gets the same image."""
    run = train(replace(config, train_text_encoder=True))
    proof = export_adapter(run.adapter, str(base), "diffusers", tmp_path / "export", prompt=PROMPT)
    assert proof.exact
    assert proof.image_difference < 1e-5 < proof.effect
    (word,) = proof.token_files
    code = f"""
import numpy, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained({str(base)!r}, safety_checker=None)
pipe.load_textual_inversion({str(word.parent)!r}, weight_name={word.name!r})
pipe.load_lora_weights({str(proof.path.parent)!r}, weight_name={proof.path.name!r})
latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
image = pipe({PROMPT!r}, latents=latents, num_inference_steps=3, output_type="np").images
numpy.save({str(tmp_path / "there.npy")!r}, image)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    pipe = load_pipeline(Recipe(prompt="", base=str(base), adapters=(str(run.adapter),), strengths=(1.0,)))
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
    here = pipe(PROMPT, latents=latents, num_inference_steps=3, output_type="np").images
    assert np.abs(here - np.load(tmp_path / "there.npy")).max() < 1e-5


@pytest.mark.parametrize(("family", "keys"), [("sdxl", {"clip_l", "clip_g"}), ("flux-dev", {"<sks>"})])
def test_families_with_several_encoders(family, keys, folders, photos, tmp_path):
    folder = folders(family)
    config = a_config(folder, photos, tmp_path / "run", token="<sks>", num_vectors=3, learning_rate=0.05)
    run = train(config)
    proof = export_adapter(run.adapter, str(folder), "diffusers", tmp_path / "export", prompt=PROMPT, width=SIDE)
    assert proof.image_difference < 1e-5
    assert load_file(proof.token_files[0]).keys() == keys


def test_composing_carries_the_words(config, tmp_path):
    first = train(replace(config, out=tmp_path / "a"))
    second = train(replace(config, out=tmp_path / "b", token="<other>", num_vectors=1))
    both = quick_config(
        ComposeConfig, adapters=(str(first.folder), str(second.folder)), base=config.base, out=tmp_path / "both"
    )
    words = load_token_embeddings(compose(both).adapter)
    assert words.keys() == {"text_encoder.<sks>", "text_encoder.<other>"}
    assert torch.equal(words["text_encoder.<sks>"], load_token_embeddings(first.adapter)["text_encoder.<sks>"])
    learned = compose(
        replace(both, images=config.images, steps=2, preview_every=0, threads=1, out=tmp_path / "learned")
    )
    assert load_token_embeddings(learned.adapter).keys() == words.keys()
    recipe = Recipe(
        prompt="<sks> and <other>", base=config.base, adapters=(str(learned.adapter),), strengths=(1.0,), steps=2
    )
    assert generate(recipe)
    again = train(replace(config, out=tmp_path / "c", seed=1))
    with pytest.raises(UserError, match="brings another <sks>"):
        compose(replace(both, adapters=(str(first.folder), str(again.folder)), out=tmp_path / "d"))
    with pytest.raises(UserError, match="Two adapters bring the word <sks>"):
        load_pipeline(replace(recipe, adapters=(str(first.adapter), str(again.adapter)), strengths=(1.0, 1.0)))


def test_words_that_cannot_be_learned(config, folders, tmp_path):
    with pytest.raises(UserError, match="is a word that the base's text_encoder knows already"):
        preflight(replace(config, token="creature</w>"))
    with pytest.raises(UserError, match="is not a single word"):
        preflight(replace(config, token="sks one"))
    with pytest.raises(UserError, match="A SanaPipeline cannot learn new tokens"):
        preflight(replace(config, base=str(folders("sana"))))
    own = shutil.copytree(config.images, tmp_path / "own")
    for path in own.glob("*.png"):
        path.with_suffix(".txt").write_text("a sks creature")
    with pytest.raises(UserError, match="No caption says <sks>"):
        train(replace(config, images=own))
    with pytest.raises(UserError, match="--num-vectors must be at least 0"):
        preflight(replace(config, num_vectors=-1))


def test_the_hash_of_an_adapter_knows_its_words(config):
    from rankfold.toolkit.formats.adapter_folder import adapter_hash

    run = train(config)
    before = adapter_hash(run.adapter)
    (run.adapter / FILE).write_bytes((run.adapter / FILE).read_bytes() + b" ")
    assert adapter_hash(run.adapter) != before
