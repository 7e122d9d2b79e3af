"""The shipped models load with the stock loaders and know the world. The full bars: benchmarks/tiny_bars.py."""

import numpy as np
import pytest
import torch

from rankfold.toolkit.core.paths import assets_folder
from rankfold.toolkit.embedded import world
from rankfold.toolkit.embedded.judge import ANSWERS, images_to_pixels, label_indices
from rankfold.toolkit.metrics.clip import ClipScorer, load_embedded_judge, psnr

TINY = assets_folder() / "tiny"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(TINY / "sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dit():
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(TINY / "dit", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size():
    folders = (TINY, TINY / "dit", TINY / "turbo", TINY / "kontext", TINY / "vlm")
    size = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in folders}
    assert size[TINY / "dit"] < 10e6
    assert size[TINY / "turbo"] < 10.1e6
    assert size[TINY / "kontext"] < 9e6
    assert size[TINY / "vlm"] < 2e6
    assert 2 * size[TINY] - sum(size.values()) < 15e6


def test_the_vision_language_model_answers():
    """Held-out images, every kind of question, through the stock classes alone."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from rankfold.training.embedded.vlm import HELD_OUT, question_image

    model = AutoModelForImageTextToText.from_pretrained(TINY / "vlm").eval()
    processor = AutoProcessor.from_pretrained(TINY / "vlm")
    assert model.dtype == torch.float32
    talks, wanted = [], []
    for number in range(12):
        image, asked = question_image(number, seed=77, stream=HELD_OUT)
        for _, question, answer in asked:
            content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
            talks.append([{"role": "user", "content": content}])
            wanted.append(answer)
    inputs = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= 0.95 * len(wanted)


def test_tokenizer_spells_rare_words(pipe):
    tokenizer = pipe.tokenizer
    assert tokenizer.tokenize("creature") == ["creature</w>"]
    assert tokenizer.decode(tokenizer("a zqx9 creature").input_ids, skip_special_tokens=True) == "a zqx 9 creature"
    assert tokenizer.unk_token_id not in tokenizer("a zqx9 é creature").input_ids[1:-1]


@pytest.mark.parametrize("name", ["pipe", "dit"])
def test_prompts_steer_the_image(request, name):
    from rankfold.pipelines.generate import denoise

    pipe = request.getfixturevalue(name)
    rng = np.random.default_rng(5)
    things = [world.random_thing(rng, held=True) for _ in range(16)]
    images = denoise(pipe, [world.caption(t) for t in things], seeds=range(16), steps=20, guidance_scale=4.0, width=64)
    answers = load_embedded_judge().classify(images)
    for name in ("shape", "colour", "scene"):
        right = sum(answer[name] == getattr(thing, name) for answer, thing in zip(answers, things, strict=True))
        assert right >= 12, name


@torch.no_grad()
def test_autoencoder(pipe):
    pixels = images_to_pixels([world.draw_sample(77, index)[0] for index in range(40)])
    back = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    assert psnr(back / 2 + 0.5, pixels / 2 + 0.5).mean() > 28


def test_clip_tells_creatures_apart():
    scorer = ClipScorer()
    views = [world.subject_images(3_500_000 + number, 2) for number in range(40)]
    first, second = (scorer.embed_images([pair[side][0] for pair in views]) for side in (0, 1))
    nearest = (first @ second.T).argmax(1)
    assert (nearest == torch.arange(40)).float().mean() >= 0.9


def test_clip_reads_captions():
    scorer = ClipScorer()
    rng = np.random.default_rng(9)
    things = [world.random_thing(rng, held=True) for _ in range(30)]
    images = scorer.embed_images([world.draw(thing, rng) for thing in things])
    texts = scorer.embed_texts([world.caption(thing) for thing in things])
    assert ((images @ texts.T).argmax(1) == torch.arange(30)).float().mean() > 0.8


@torch.no_grad()
def test_the_flow_transformer_was_trained_as_the_pipeline_runs_it():
    """One token instead of T5's 256 alike ones is the same computation, and the words are put together alike."""
    from rankfold.toolkit.diffusion.load import open_model, resolve_base
    from rankfold.training.embedded.dit import Learner, first_encoder
    from rankfold.training.embedded.loop import BuildTinyConfig

    model = open_model(resolve_base("tiny-dit"))
    texts = ["two red striped circles on the beach", ""]
    noisy, levels = torch.randn(2, 24, 8, 8), torch.tensor([0.3, 0.8])
    there = model.predict(noisy, levels, model.encode_prompts(texts))
    ids = torch.tensor(model.tokenizer(texts, padding="max_length", truncation=True).input_ids)
    said = first_encoder(BuildTinyConfig(out=TINY))(ids, output_hidden_states=True)
    learner = Learner(model.transformer, model.text_encoder_2)
    here = learner(noisy, levels, said.hidden_states[-2], said.text_embeds, ids)
    assert there.std() > 0.3
    torch.testing.assert_close(here, there, rtol=1e-3, atol=5e-3)  # the first encoder's projection was kept in fp16


@torch.no_grad()
@pytest.mark.parametrize("length", [24, 512])
def test_the_model_with_references_was_trained_as_the_pipeline_runs_it(length):
    """One token instead of all padding, however much there is, and a masked reference instead of none."""
    from rankfold.toolkit.diffusion.load import open_model, resolve_base
    from rankfold.toolkit.diffusion.model import pack_latents
    from rankfold.training.embedded.kontext import LONGEST, WORDS, Learner, Texts
    from rankfold.training.embedded.loop import BuildTinyConfig

    model = open_model(resolve_base("tiny-kontext"))
    texts = ["the same in red", "a large blue smiling square under the sea in the centre"]
    known = Texts(BuildTinyConfig(out=TINY), model.tokenizer_2, texts)
    latents, reference, levels = torch.randn(2, 24, 8, 8), torch.randn(2, 24, 8, 8), torch.tensor([0.3, 0.8])
    ids, pooled, bias = known.batch(texts, np.random.default_rng(0))
    for row, text in enumerate(texts):
        bias[row, WORDS] = np.log(length - len(known.ids[text]))
    bias = torch.nn.functional.pad(bias, (0, 32))
    bias[1, -16:] = -torch.inf
    learner = Learner(model.transformer, model.text_encoder_2)
    here = learner(pack_latents(latents), pack_latents(reference), levels, ids, pooled, bias)
    pipe = model.text_pipeline()
    for row, references in enumerate(([reference[:1]], [])):
        states, clip, _ = pipe.encode_prompt(texts[row], None, max_sequence_length=length)
        words = {"prompt_embeds": states, "pooled_prompt_embeds": clip}
        there = pack_latents(model.predict(latents[row : row + 1], levels[row : row + 1], words, references))
        assert there.std() > 0.3
        torch.testing.assert_close(here[row : row + 1], there, rtol=1e-3, atol=1e-3)
    assert LONGEST == 512


@torch.no_grad()
def test_the_distilled_model_draws_in_four_steps(dit):
    """Through the stock pipeline alone: combinations it has not seen, surer to the judge than what its teacher draws as fast."""
    from diffusers import StableDiffusion3Pipeline

    rng = np.random.default_rng(8)
    things = [world.random_thing(rng, held=True) for _ in range(24)]
    goal, judge = torch.tensor([label_indices(thing) for thing in things]), load_embedded_judge()
    chances = []
    turbo = StableDiffusion3Pipeline.from_pretrained(TINY / "turbo", text_encoder_3=None, tokenizer_3=None)
    turbo.set_progress_bar_config(disable=True)
    for pipe in (turbo, dit):
        noise = torch.Generator().manual_seed(3)
        prompts = [world.caption(thing) for thing in things]
        images = pipe(prompts, num_inference_steps=4, guidance_scale=1.0, height=64, width=64, generator=noise).images
        logits = judge(images_to_pixels(images))
        found = [
            logits[kind].log_softmax(-1).gather(1, goal[:, list(ANSWERS).index(kind), None])
            for kind in ("shape", "pattern")
        ]
        chances.append(torch.cat(found).mean().item())
    assert chances[0] > chances[1] + 0.1


def test_the_model_with_references_copies():
    """Through the stock pipeline alone, whose prompts are padded to 512 tokens: combinations it has not seen, and none of their words."""
    from diffusers import FluxKontextPipeline

    from rankfold.toolkit.embedded import edits

    pipe = FluxKontextPipeline.from_pretrained(TINY / "kontext")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(6)
    things = [edits.random_figure(rng, held=True) for _ in range(8)]
    images = [edits.draw_apart(thing, 100 + number, 200 + number) for number, thing in enumerate(things)]
    made = pipe(
        image=images, prompt=[edits.SAME] * 8, num_inference_steps=6, height=64, width=64, max_area=64 * 64, _auto_resize=False,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    answers = load_embedded_judge().classify(made)
    for name in ("shape", "scene", "colour"):
        right = sum(answer[name] == getattr(thing, name) for answer, thing in zip(answers, things, strict=True))
        assert right >= 7, name


def test_the_autoencoder_has_no_spread():
    """The denoiser was trained on means, so what subject training samples must be the mean."""
    from rankfold.toolkit.diffusion.load import open_model, resolve_base
    from rankfold.toolkit.embedded import world

    image, _ = world.subject_images(2_000_004, 1)[0]
    latents = open_model(resolve_base("tiny")).encode_image(image)
    assert latents["mean"].std() > 0.5
    assert latents["std"].max() < 1e-3
