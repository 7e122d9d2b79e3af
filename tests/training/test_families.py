"""Every family against its own stock pipeline: what it encodes, what it predicts, what it trains and what it exports."""

import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from forked import run_in_two_processes
from PIL import Image
from short_runs import train_until, write_config
from tiny_families import BUILDERS, EDITORS, SIDE

from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, denoise, generate, load_pipeline
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.families import FAMILIES
from rankfold.toolkit.diffusion.families.flux_2 import Flux2
from rankfold.toolkit.diffusion.load import open_model, resolve_base
from rankfold.toolkit.diffusion.model import pack_latents, pad_and_stack, unpack_latents
from rankfold.toolkit.formats.adapter_facts import AdapterFacts
from rankfold.toolkit.formats.adapter_folder import WEIGHTS, check_adapter_folder
from rankfold.toolkit.formats.header import describe_file
from rankfold.toolkit.formats.write import Part
from rankfold.training.launch.start import resume, train
from rankfold.training.subject.task import SubjectTask

PROMPT = "a sks creature on the beach"


@pytest.fixture(params=list(BUILDERS))
def folder(request, folders):
    return folders(request.param)


def as_latents(model, tensor):
    """What a pipeline carries through its loop, as latents (B, C, H, W)."""
    side = SIDE // model.latent_scale
    if tensor.dim() == 4:
        return tensor
    if isinstance(model, Flux2):
        return tensor.transpose(1, 2).reshape(len(tensor), -1, side, side)
    return unpack_latents(tensor, side, side)


def record_sampling(model, pipe, words):
    """One image by the stock pipeline without guidance: what went into each scheduler step and came out, and into the VAE."""
    steps, decoded = [], []
    step, decode = pipe.scheduler.step, pipe.vae.decode

    def recording_step(output, timestep, sample, *more, **named):
        answer = step(output, timestep, sample, *more, **named)
        steps.append(SimpleNamespace(output=output, timestep=timestep, sample=sample, next=answer[0]))
        return answer

    def recording_decode(latents, *more, **named):
        decoded.append(latents)
        return decode(latents, *more, **named)

    pipe.scheduler.step, pipe.vae.decode = recording_step, recording_decode
    denoise(pipe, words, seeds=[3], steps=3, guidance_scale=model.guidance_off, width=SIDE, negative=words)
    return steps, decoded[0]


def test_predicts_what_the_stock_pipeline_does(folder):
    model = open_model(resolve_base(str(folder)))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    with torch.no_grad():
        words = model.encode_prompts([PROMPT])
    steps, _ = record_sampling(model, pipe, words)
    for one in steps:
        timestep = torch.as_tensor(one.timestep).reshape(1)
        level = timestep.float() / 1000 if model.is_flow else timestep.long()
        with torch.no_grad():
            guess = model.predict(as_latents(model, one.sample), level, words)
        assert guess.abs().max() > 1e-3
        torch.testing.assert_close(guess, as_latents(model, one.output), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["krea2", "ernie-image"])
def test_words_are_what_the_stock_pipeline_makes_of_them(folders, name):
    """Where a family encodes prompts by its own way: without padding, or with a gradient."""
    model = open_model(str(folders(name)))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    texts, others = [PROMPT, "a creature, large"], ["blurred", "a drawing of something that nobody has asked for"]
    with torch.no_grad():
        words, against = (model.encode_prompts(said) for said in (texts, others))
    given = {"seeds": [3, 4], "steps": 2, "guidance_scale": 3.0, "width": SIDE, "output_type": "latent"}
    from_text, from_words = (
        denoise(pipe, prompts, negative=negative, **given) for prompts, negative in ((texts, others), (words, against))
    )
    torch.testing.assert_close(torch.as_tensor(from_words), torch.as_tensor(from_text), rtol=1e-4, atol=1e-4)
    assert (from_text[0] - from_text[1]).abs().max() > 1e-3


def test_settings_of_a_pipeline_are_no_parts(folders, tmp_path):
    """Krea 2 lists the layers that it reads, two of them as well as twelve; a distilled one has one shift for all sizes."""
    folder = shutil.copytree(folders("krea2"), tmp_path / "krea2")
    index = json.loads((folder / "model_index.json").read_text())

    def say(**values):
        (folder / "model_index.json").write_text(json.dumps(index | values))
        return resolve_base(str(folder))

    model = open_model(say(text_encoder_select_layers=[1, 2], is_distilled=True))
    assert sorted(model.parts) == ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert model.pipeline().text_encoder_select_layers == (1, 2)
    assert model.sampling_shift(64, 64) == model.sampling_shift(128, 32) == pytest.approx(math.exp(1.15))
    assert open_model(say()).sampling_shift(64, 64) != open_model(str(folder)).sampling_shift(128, 128)
    for values in (
        {"vae": [1, 2]},
        {"vae": ["diffusers"]},
        {"text_encoder": [3]},
        {"more": ["a"]},
        {"more": [None, 1]},
    ):
        with pytest.raises(UserError, match="where library and class should be"):
            say(**values)


def test_prompts_are_not_written_anew(folders):
    """ERNIE-Image's enhancer is not loaded: an image is of what the prompt says."""
    pipe = load_pipeline(Recipe(prompt=PROMPT, base=str(folders("ernie-image"))))
    assert (pipe.pe, pipe.pe_tokenizer) == (None, None)


def test_encodes_what_the_stock_pipeline_decodes(folder, monkeypatch):
    """The latents that the pipeline ends with are the ones that its autoencoder's input is encoded to."""
    model = open_model(str(folder))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    with torch.no_grad():
        words = model.encode_prompts([PROMPT])
    steps, raw = record_sampling(model, pipe, words)
    posterior = SimpleNamespace(mean=raw, std=torch.ones_like(raw))
    monkeypatch.setattr(model.vae, "encode", lambda pixels: SimpleNamespace(latent_dist=posterior, latent=raw))
    mean, std = model.encode_pixels(torch.zeros(1, 3, SIDE, SIDE))
    torch.testing.assert_close(mean, as_latents(model, steps[-1].next), rtol=1e-4, atol=1e-5)
    assert std.shape == mean.shape
    assert mean.shape[2:] == (SIDE // model.latent_scale,) * 2


def test_encodes_images(folder):
    model = open_model(str(folder))
    image = Image.effect_noise((SIDE, SIDE), 80).convert("RGB")
    latents = model.encode_image(image)
    shape = latents["mean"].shape
    assert shape == latents["std"].shape
    assert shape[1:] == (SIDE // model.latent_scale,) * 2
    assert latents["mean"].std() > 1e-4


def test_released_parts_leave_memory_at_once(folder):
    """Nothing holds them in a circle, so no garbage has to be looked for while a run goes on."""
    model = open_model(str(folder))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    denoise(pipe, [PROMPT], seeds=[3], steps=2, guidance_scale=model.guidance_off, width=SIDE)
    model.encode_image(Image.effect_noise((SIDE, SIDE), 80).convert("RGB"))
    held = [weakref.ref(model.loaded[name]) for name in ("vae", *model.text_encoders())]
    gc.collect()
    gc.disable()
    try:
        model.release()
        del pipe
        assert [part() for part in held] == [None] * len(held)
    finally:
        gc.enable()


def test_prompts_of_other_lengths_do_not_change_each_other(folder):
    """Words encoded alone and filled up predict what they predict alone: masks are kept."""
    model = open_model(str(folder))
    short, long = "a creature", "a large sks creature in the city at the left, with three eyes and a tail"
    with torch.no_grad():
        rows = [model.encode_prompts([text]) for text in (short, long)]
        both = pad_and_stack(rows)
        latents = torch.randn(1, *model.encode_image(Image.new("RGB", (SIDE, SIDE)))["mean"].shape)
        level = torch.tensor([0.5]) if model.is_flow else torch.tensor([500])
        together = model.predict(latents.expand(2, -1, -1, -1).contiguous(), level.expand(2), both)
        for number, row in enumerate(rows):
            alone = model.predict(latents, level, row)
            torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------- training


OTHERS = ("lora", "fvae", "loratrf", "glora")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of two steps on a family's denoiser, and on its text encoders where asked for; trained once."""
    made = {}

    def run(folder, adapter="moslora", *, text):
        if (folder, adapter, text) not in made:
            config = a_config(folder, photos, tmp_path_factory.mktemp("trained") / "run", adapter=adapter)
            made[folder, adapter, text] = train(replace(config, train_text_encoder=text))
        return made[folder, adapter, text]

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.campaign) if name == "flux2-dev" else name for name in BUILDERS
    ],  # trains as klein does
)
def test_trains_and_is_used(folders, trained, name):
    """MoSLoRA, and one other adapter in turn."""
    for adapter in ("moslora", OTHERS[list(BUILDERS).index(name) % len(OTHERS)]):
        changes_the_image(folders(name), trained(folders(name), adapter, text=True))


@pytest.mark.campaign
@pytest.mark.parametrize("adapter", OTHERS)
def test_every_adapter_trains_and_is_used(folder, trained, adapter):
    changes_the_image(folder, trained(folder, adapter, text=True))


def changes_the_image(folder, run):
    """The adapter of denoiser and text encoders, on a stock pipeline."""
    model = open_model(str(folder))
    assert check_adapter_folder(run.adapter) == [model.denoiser_name, *model.text_encoders()]
    recipe = Recipe(prompt=PROMPT, base=str(folder), steps=2, width=SIDE)
    ((plain, _),) = generate(recipe)
    ((tuned, _),) = generate(
        replace(recipe, adapters=(str(run.adapter),), strengths=(8.0,))
    )  # above what 8 bits round away
    assert plain.tobytes() != tuned.tobytes()


def test_layers_without_a_part_carry_no_adapter(folder, photos, tmp_path, capsys):
    """SDXL never reads the last states of its first encoder, FLUX.2 nothing behind layer 27: every adapter that is there learns."""
    config = a_config(folder, photos, tmp_path / "run", train_text_encoder=True)
    task = SubjectTask(config, find_samples(photos), str(folder), Accelerator(cpu=True))
    task.module(task.batch(0, [0, 1])).sum().backward()
    silent = [name for name, p in task.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    said = capsys.readouterr().out
    known = {
        "StableDiffusionXL": "text_encoder: 4 layers",
        "ZImage": "text_encoder: 4 layers",
        "Flux2Klein": "text_encoder: 4 layers",
        "Krea2": "text_encoder: 4 layers",
        "ErnieImage": "text_encoder: 12 layers",  # those of its eyes, too
    }
    assert known.get(type(task.training.model).__name__, "") in said


RESUMED = ("sdxl", "sd3", "flux-dev", "flux2-klein", "z-image")
ALIKE = [pytest.param(name, marks=pytest.mark.campaign) for name in BUILDERS if name not in RESUMED]


@pytest.mark.parametrize("name", [*RESUMED, *ALIKE])
def test_resume_is_exact(folders, photos, tmp_path, name):
    """Where batches hold more than latents and one prompt's states; with previews from cached words on the way."""
    folder = folders(name)
    config = a_config(folder, photos, tmp_path / "a", steps=4, preview_every=2, preview_steps=1, checkpoint_every=2)
    whole, part = train(config), train_until(replace(config, out=tmp_path / "b"), 2)
    resume(part.folder)
    name = open_model(str(folder)).denoiser_name
    files = [run.adapter / name / WEIGHTS for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    samples = [sorted(run.samples.iterdir()) for run in (whole, part)]
    assert [f.read_bytes() for f in samples[0]] == [f.read_bytes() for f in samples[1]]


def test_exports_to_stock_diffusers(folder, trained, tmp_path):
    run = trained(folder, text=False)
    proof = export_adapter(run.adapter, str(folder), "diffusers", tmp_path / "export", width=SIDE)
    assert proof.reader == "diffusers"
    assert proof.layers > 0
    assert proof.weight_error < 1e-5
    assert proof.image_difference < 1e-3
    assert proof.effect > 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("sd", {}, ("stable-diffusion-v1", "sd_v1")),
        ("sd", {"cross_attention_dim": 1024}, ("stable-diffusion-v2-512", "sd_v2")),
        ("sd", {"cross_attention_dim": 1024, "sample_size": 96}, ("stable-diffusion-v2-768-v", "sd_v2")),
        ("sdxl", {}, ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")),
        ("sd3", {}, ("stable-diffusion-3", "sd3")),
        ("flux-dev", {}, ("flux-1-dev", "flux1")),
        ("z-image", {}, ("z-image", "z-image")),
    ],
)
def test_headers_say_for_which_bases_a_file_is(folders, family, changes, expected):
    """As A1111 and other readers sort files by: one that is said to be for Stable Diffusion 1 is hidden beside an XL base."""
    part = folders(family) / open_model(str(folders(family))).denoiser_name
    kind = getattr(diffusers, json.loads((part / "config.json").read_text())["_class_name"])
    denoiser = kind.from_config(kind.load_config(part) | changes)
    change = {"unet": Part(denoiser, {}, "lora")}
    facts = AdapterFacts(base="/home/somebody/models/mine.safetensors")
    header = describe_file({}, change, facts, title="mine")
    assert (header["modelspec.architecture"], header["ss_base_model_version"]) == (f"{expected[0]}/lora", expected[1])
    assert header.get("ss_v2") == ("True" if expected[1] == "sd_v2" else None)
    assert header["ss_sd_model_name"] == "mine.safetensors"
    assert describe_file({}, change, AdapterFacts(base="who/what"), title="mine")["ss_sd_model_name"] == "who/what"


def test_two_processes_give_the_same_curve(folders, photos, tmp_path):
    """With rows that are asked twice, which are divided unevenly."""
    settings = {"steps": 3, "batch_size": 4, "log_every": 1, "preservation_weight": 1.0}
    ones, files = {}, []
    for name in ("sdxl", "flux-dev", "z-image"):
        own = settings | {"train_text_encoder": name == "sdxl"}
        config = a_config(folders(name), photos, tmp_path / name, **own)
        ones[name] = train(config)
        files.append(write_config(replace(config, out=tmp_path / f"{name}-two"), tmp_path / f"{name}.yaml"))
    run_in_two_processes(tmp_path, *(["train", "subject", "--config", str(file)] for file in files))
    for name, one in ones.items():
        two = Run(tmp_path / f"{name}-two")
        assert two.status()["processes"] == 2
        for a, b in zip(one.metrics(), two.metrics(), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3), name


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_exports_text_encoders_or_says_why_not(folder, trained, tmp_path, format):
    run = trained(folder, text=True)
    model = open_model(str(folder))
    readable = {"diffusers": {model.denoiser_name, *model.lora_text_encoders}, "kohya": set(model.kohya_prefixes)}
    if format == "peft" or {model.denoiser_name, *model.text_encoders()} <= readable[format]:
        proof = export_adapter(run.adapter, str(folder), format, tmp_path / "export", width=SIDE)
        assert proof.weight_error < 1e-5
        assert proof.image_difference < 1e-3
    else:
        with pytest.raises(UserError, match="use --format"):
            export_adapter(run.adapter, str(folder), format, tmp_path / "export", width=SIDE)


def test_packing_is_the_stock_one():
    latents = torch.randn(2, 3, 4, 6)
    tokens = diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6)
    assert torch.equal(pack_latents(latents), tokens)
    assert torch.equal(unpack_latents(tokens, 4, 6), latents)


def test_every_family_is_tried():
    tried = {type(make()).__name__ for make in (BUILDERS | EDITORS).values()}
    assert tried == {name for family in FAMILIES for name in family.pipelines}
    assert all(family.licence for family in FAMILIES)


def test_auto_shift_is_the_stock_pipelines(folder, monkeypatch):
    """By the number of tokens: the mu that the stock pipeline itself asks its scheduler for, at a size that is not square."""
    model = open_model(str(folder))
    if not model.is_flow:
        return
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    dynamic = dict(pipe.scheduler.config) | {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3}
    pipe.scheduler = type(pipe.scheduler).from_config(dynamic)
    monkeypatch.setattr(model, "part_config", lambda name, file="config.json", read=model.part_config: (
        dynamic if name == "scheduler" else read(name, file)
    ))  # fmt: skip
    asked = []

    class Asked(Exception):
        pass

    def ask(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        asked.append(mu)
        raise Asked

    pipe.scheduler.set_timesteps = ask
    with pytest.raises(Asked):
        pipe(prompt=PROMPT, width=2 * SIDE, height=SIDE, num_inference_steps=50, **pipe_extras(model))
    latents = (SIDE // model.latent_scale, 2 * SIDE // model.latent_scale)
    if asked != [None]:  # Sana's asks for none: its shift is one value
        assert model.sampling_shift(*latents) == pytest.approx(math.exp(asked[0]))


def pipe_extras(model):
    return {"Sana": {"use_resolution_binning": False}, "FluxKontext": {"max_area": 2 * SIDE * SIDE}}.get(
        type(model).__name__, {}
    )
