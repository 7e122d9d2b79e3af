"""Training with references: what the model is given is what its stock pipeline gives it, pairs are checked, learned, resumed and drawn."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from family_runs import a_config
from PIL import Image, ImageOps
from short_runs import train_until
from tiny_families import EDITORS

from rankfold.apps.cli import main
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, denoise, generate, read_recipe, save_image
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.references import add_references, reference_notes
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.families.flux_2 import Flux2
from rankfold.toolkit.diffusion.load import open_model
from rankfold.training.launch.plan import plan
from rankfold.training.launch.start import check_config, resume, train
from rankfold.training.launch.trained_on import collect_training_data
from rankfold.training.subject.task import SubjectTask

SIDE = 64  # pixels; FLUX.2's pipeline takes no smaller reference
FAMILIES = ("flux2-klein", "flux2-dev", "flux-kontext", *EDITORS)
PROMPT = "make it blue"


def noise_image(number, size=(SIDE, SIDE)):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def pairs(tmp_path):
    """Four targets with captions, a reference of the same name each, and a second folder of references."""
    for number in range(4):
        for folder, offset in (("targets", 0), ("before", 10), ("more", 20)):
            (tmp_path / folder).mkdir(exist_ok=True)
            noise_image(number + offset).save(tmp_path / folder / f"{number}.png")
        (tmp_path / "targets" / f"{number}.txt").write_text(f"{PROMPT} {number}")
    return tmp_path


def an_edit(folder, pairs, out, **more):
    settings = {
        "references": (pairs / "before",),
        "resolution": SIDE,
        "preservation_weight": 0.0,
        "class_noun": "image",
    }
    return a_config(folder, pairs / "targets", out, **(settings | more))


@pytest.fixture(autouse=True)
def small_references(monkeypatch):
    """Qwen-Image-Edit's pipeline scales references to a megapixel, and for the text encoder to 384 pixels a side: here to less."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    scale = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: scale(96 * 96, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 96)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", SIDE * SIDE)


@pytest.fixture(params=FAMILIES)
def folder(request, folders):
    return folders(request.param)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (2 * SIDE, SIDE)])
def test_the_model_is_given_what_the_stock_pipeline_gives_it(folder, size):
    """In every step of an image that is made from references: tokens, their places, timestep, words; and what it says of the image."""
    model = open_model(str(folder))
    pipe = model.pipeline(model.denoiser_name, "vae", *model.text_encoder_names)
    references = [noise_image(1, size), noise_image(2)][: model.max_references]
    seen = model.prompts_see_references
    with torch.no_grad():
        words = model.encode_prompts([PROMPT], references) if seen else model.encode_prompts([PROMPT])
    inputs, outputs, forward = [], [], model.denoiser.forward

    def recording(**given):
        inputs.append(given)
        answer = forward(**given)
        outputs.append(answer[0] if isinstance(answer, tuple) else answer.sample)
        return answer

    model.denoiser.forward = recording
    given, sizes = [PROMPT] if seen else words, [model.own_reference_size(image.size) for image in references]
    denoise(pipe, given, seeds=[3], steps=2, guidance_scale=1.0, width=SIDE, negative=given, references=references)
    scaled = [
        image.resize(own or image.size, Image.Resampling.LANCZOS) for image, own in zip(references, sizes, strict=True)
    ]
    stock, said = inputs.copy(), outputs.copy()
    latents = [model.encode_image(image)["mean"][None] for image in scaled]
    side = SIDE // model.latent_scale
    count = side**2 // model.patch_size**2
    for given, answer in zip(stock, said, strict=True):
        inputs.clear()
        tokens = given["hidden_states"][:, :count]
        noisy = from_tokens(model, tokens, side)
        with torch.no_grad():
            guess = model.predict(noisy, given["timestep"], words, latents)
        (own,) = inputs
        assert own.get("img_shapes") == given.get("img_shapes")
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "txt_ids", "img_ids"):
            if name not in given:
                assert name.endswith("ids")
                continue
            torch.testing.assert_close(own[name].float(), given[name].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guess, from_tokens(model, answer[:, :count], side), rtol=1e-3, atol=1e-4)
        assert answer.shape[1] > count


def from_tokens(model, tokens, side):
    """Tokens of an image as latents."""
    from rankfold.toolkit.diffusion.model import unpack_latents

    if isinstance(model, Flux2):
        return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    return unpack_latents(tokens, side, side)


def test_references_change_the_loss_and_the_gradient(folder, pairs, tmp_path):
    """The loss is of the target's latents alone, and is another with another image's references."""
    config = an_edit(folder, pairs, tmp_path / "run")
    samples = add_references(find_samples(config.images), config.references)
    task = SubjectTask(config, samples, str(folder), Accelerator(cpu=True))
    batch = task.training.batch(0, [0, 1])
    own_size = task.training.model.own_reference_size((SIDE, SIDE))
    assert (batch["reference_0"].shape == batch["mean"].shape) == (own_size is None)
    with torch.no_grad():
        own = task.training.module(batch)
        other = task.training.module(batch | {"reference_0": batch["reference_0"].flip(0)})
        without = task.training.module({name: value for name, value in batch.items() if name != "reference_0"})
    assert own.shape == (2,)
    assert (own - other).abs().min() > 1e-6
    assert (own - without).abs().min() > 1e-6


def test_trains_resumes_and_draws(folder, pairs, tmp_path):
    """Previews are made from the first pairs; a resumed run is the same; an image from a reference can be repeated."""
    config = an_edit(folder, pairs, tmp_path / "a", steps=4, checkpoint_every=2, preview_every=2, preview_steps=1)
    whole, part = train(config), train_until(replace(config, out=tmp_path / "b"), 2)
    resume(part.folder)
    files = [next(run.adapter.rglob("*.safetensors")) for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(list((whole.folder / "samples").glob("*.png"))) >= 2
    assert json.loads((whole.folder / "summary.json").read_text())["references"] == {"1": 4}
    recipe = Recipe(
        prompt=PROMPT, base=str(folder), adapters=(str(whole.adapter),), strengths=(1.0,), steps=1, width=SIDE, guidance_scale=1.0,
        references=(str(pairs / "before" / "0.png"),),
    )  # fmt: skip
    (made, own), (other, _) = (
        generate(recipe)[0],
        generate(replace(recipe, references=(str(pairs / "before" / "1.png"),)))[0],
    )
    assert made.tobytes() != other.tobytes()
    save_image(tmp_path / "made.png", made, own)
    assert read_recipe(tmp_path / "made.png") == own
    noise_image(99).save(pairs / "before" / "0.png")
    with pytest.raises(UserError, match="has changed since"):
        read_recipe(tmp_path / "made.png")
    with pytest.raises(UserError, match="reference 1 of"):
        resume(whole.folder)


@pytest.mark.parametrize("name", EDITORS)
def test_prompts_are_encoded_with_their_own_references(folders, pairs, tmp_path, name):
    """The same words are other states for each pair, as the stock pipeline itself makes them; mirrored, without the token, and dropped."""
    for number in range(4):
        (pairs / "targets" / f"{number}.txt").write_text("a sks thing in blue")
    noise_image(7, (2 * SIDE, SIDE)).save(pairs / "before" / "1.png")
    config = an_edit(
        folders(name), pairs, tmp_path / "run", flip=True, preservation_weight=1.0, caption_dropout=0.5, batch_size=1,
    )  # fmt: skip
    samples = add_references(find_samples(config.images, flip=True), config.references)
    training = SubjectTask(config, samples, str(folders(name)), Accelerator(cpu=True)).training
    pipe = training.model.pipeline(*training.model.text_encoder_names)
    found = {}
    for sample in samples:
        for text in (sample.caption, ""):
            image = Image.open(sample.references[0])
            image = ImageOps.mirror(image) if sample.flip else image
            seen = training.model.seen_references(pipe, [image])
            with torch.no_grad():
                states, _ = pipe.encode_prompt([text], image=seen, device="cpu")
            own = training.prompts.embeds_of(training.prompts.numbers_of([text], [sample]))
            length = int(own["prompt_embeds_mask"].sum())
            assert length == states.shape[1]
            torch.testing.assert_close(own["prompt_embeds"][:, :length], states, rtol=1e-5, atol=1e-5)
            found[text, sample.path.name, sample.flip] = states
    assert len({states.flatten()[-8:].sum().item() for states in found.values()}) == len(found) == 16
    batches = [training.batch(position, [0]) for position in range(24)]
    keys = list(training.prompts.numbers)
    asked = [keys[int(batch["prompt"])] for batch in batches]
    assert {text for text, _, _ in asked} == {"a sks thing in blue", ""}
    assert all(len(paths) == 1 for _, paths, _ in asked)
    kept = {keys[int(batch["preservation_prompt"])][:2] for batch in batches if "preservation" in batch}
    assert len(kept) > 1
    assert {text for text, _ in kept} == {"a thing in blue"}


@pytest.mark.parametrize("name", EDITORS)
def test_a_base_that_draws_from_references_only(folders, pairs, tmp_path, name, capsys):
    """Exported and planned like any other; what lacks a reference is refused before anything is loaded."""
    base, out = folders(name), tmp_path / "run"
    config = an_edit(base, pairs, out, steps=1)
    run = train(config)
    proof = export_adapter(run.adapter, str(base), "diffusers", tmp_path / "export", width=SIDE)
    assert (proof.reader, proof.weight_error < 1e-5, proof.effect > 0) == ("diffusers", True, True)
    assert plan(replace(config, out=tmp_path / "plan")).working > 0
    with pytest.raises(SystemExit):
        main(["sample", "--base", str(base), "--prompt", "x", "--width", str(SIDE), "--out", str(tmp_path / "none")])
    assert "makes images from others: give 1 to" in capsys.readouterr().err
    for change in ({"references": ()}, {"reference_dropout": 0.1}):
        with pytest.raises(UserError, match=r"needs 1 to|does not work with references of this base"):
            check_config(replace(config, out=tmp_path / "other", **change))
    made = generate(
        Recipe(prompt=PROMPT, base=str(base), steps=1, width=SIDE, references=(str(pairs / "before" / "0.png"),)), 2
    )
    assert made[0][0].tobytes() != made[1][0].tobytes()


def test_several_references_and_other_shapes(folders, pairs, tmp_path):
    """By a table, 0 to 2 a row, of shapes of their own; dropped in a share of the passes."""
    folder = folders("flux2-klein")
    noise_image(7, (2 * SIDE, SIDE)).save(pairs / "before" / "wide.png")
    rows = [["../before/0.png", "../before/wide.png"], "../before/1.png", [], ["../more/3.png", "../before/wide.png"]]
    table = [
        {"file_name": f"{number}.png", "text": PROMPT} | ({"references": names} if names else {})
        for number, names in enumerate(rows)
    ]
    (pairs / "targets" / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    config = an_edit(
        folder,
        pairs,
        tmp_path / "run",
        references=(),
        crop="bucket",
        reference_dropout=0.5,
        batch_size=1,
        resolution=128,
    )
    samples = find_samples(config.images)
    assert [len(sample.references) for sample in samples] == [2, 1, 0, 2]
    task = SubjectTask(config, samples, str(folder), Accelerator(cpu=True))
    passes = [task.training.batch(position, [0]) for position in range(40)]
    counts = [sum(name.startswith("reference_") for name in batch) for batch in passes]
    assert set(counts) == {0, 1, 2}
    assert counts == [sum(name.startswith("reference_") for name in task.training.batch(n, [0])) for n in range(40)]
    wide = next(batch for batch in passes if "reference_1" in batch)["reference_1"]
    assert 1.7 < wide.shape[3] / wide.shape[2] < 2.3
    assert "Have no reference and are learned without: 2.png." in " ".join(reference_notes(samples, ()))
    train(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pairs: (pairs / "before" / "2.png").unlink(), "2.png has no reference in --references"),
        (lambda pairs: (pairs / "before" / "2.png").write_bytes(b"no image"), "a reference of 2.png"),
        (lambda pairs: (pairs / "targets" / "2.txt").unlink(), "no caption that says what becomes of them"),
        (
            lambda pairs: (pairs / "targets" / "metadata.jsonl").write_text(
                json.dumps({"file_name": "0.png", "text": f"{PROMPT} 0", "references": "gone.png"})
            ),
            "leave one of the two out",
        ),
    ],
)
def test_pairs_are_checked_before_the_start(folders, pairs, tmp_path, change, words):
    change(pairs)
    with pytest.raises(UserError) as error:
        check_config(an_edit(folders("flux2-klein"), pairs, tmp_path / "run"))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("base", "more", "words"),
    [
        ("sd", {}, "takes no references"),
        ("flux-kontext", {"references": 2}, "takes 1 of an image"),
        ("flux2-klein", {"prior_weight": 1.0}, "--prior-weight does not work with references"),
        ("flux2-klein", {"resolution": 32}, "sides of 64 and more"),
        ("flux2-klein", {"references": 0, "reference_dropout": 0.1}, "no image has any"),
    ],
)
def test_settings_that_do_not_go_with_references(folders, pairs, tmp_path, base, more, words):
    named = (pairs / "before", pairs / "more")[: more.pop("references", 1)]
    with pytest.raises(UserError) as error:
        check_config(an_edit(folders(base), pairs, tmp_path / "run", references=named, **more))
    assert words in str(error.value)


def test_what_is_probably_not_meant(pairs):
    """Other shapes, one of the two turned, the same file twice, files that are nobody's; EXIF is followed."""
    samples = add_references(find_samples(pairs / "targets"), (pairs / "before",))
    assert reference_notes(samples, (pairs / "before",)) == []
    wide = noise_image(5, (80, 40))
    wide.save(pairs / "targets" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    ImageOps.exif_transpose(wide).rotate(90, expand=True).save(pairs / "before" / "0.png", exif=exif)
    noise_image(6, (40, 80)).save(pairs / "before" / "1.png")
    noise_image(6, (80, 40)).save(pairs / "targets" / "1.png")
    noise_image(8, (90, 40)).save(pairs / "before" / "2.png")
    (pairs / "before" / "3.png").write_bytes((pairs / "targets" / "3.png").read_bytes())
    noise_image(9).save(pairs / "before" / "spare.png")
    said = " ".join(reference_notes(samples, (pairs / "before",)))
    assert "Lie where their reference stands, as both are seen (EXIF is followed): 1.png." in said
    assert "Have another shape than their reference: 2.png." in said
    assert "Are the same file as their reference, so that nothing would change: 3.png." in said
    assert f"Not used of --references {pairs / 'before'}: spare.png." in said


def test_a_plan_counts_references(folders, pairs, tmp_path):
    """An image with two references takes more than one without, and as much more for each."""
    peaks = []
    for count in range(3):
        named = (pairs / "before", pairs / "more")[:count]
        peaks.append(plan(an_edit(folders("flux2-klein"), pairs, tmp_path / "run", references=named)).working)
    assert peaks[0] < peaks[1] < peaks[2]


@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image-edit-plus"])
def test_measured_while_it_is_learned(folders, pairs, tmp_path, name):
    """Held-out pairs are drawn from their own references; the reference as if nothing were done stands beside, and the best is kept."""
    config = an_edit(
        folders(name), pairs, tmp_path / "run", steps=2, evaluate_every=1, evaluate_clip="embedded", keep="best",
        hold_out=("0.png", "2.png"), preview_steps=1,
    )  # fmt: skip
    run = train(config)
    rows = [row for row in run.metrics() if "faithfulness" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert len({row["likeness_unchanged"] for row in rows}) == 1
    measured = [json.loads(line) for line in (run.folder / "measured.jsonl").read_text().splitlines()]
    assert [row["prompts"] for row in measured] == [[f"1: {PROMPT} 0", f"2: {PROMPT} 2"]] * 3
    assert (run.folder / "choice.json").is_file()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"evaluate_prompts": "object"}, "images with references are measured by their captions"),
        ({"evaluate_images": "more"}, "None of the images to measure by has a reference"),
    ],
)
def test_measuring_that_does_not_go_with_references(folders, pairs, tmp_path, more, words):
    if "evaluate_images" in more:
        more = {"evaluate_images": pairs / more["evaluate_images"]}
    config = an_edit(
        folders("flux2-klein"), pairs, tmp_path / "run", evaluate_every=1, evaluate_clip="embedded", **more
    )
    with pytest.raises(UserError, match=words):
        check_config(config)


def test_evaluated_on_pairs(folder, pairs, tmp_path, capsys):
    """Target, reference and another's reference; the base's own figures are those of its images, and the pairs it learned are counted."""
    run = train(an_edit(folder, pairs, tmp_path / "run", steps=1))
    own = ["--clip", "embedded", "--n", "2", "--steps", "1"]
    main(["evaluate", str(run.folder), *own])
    assert "likeness to the target" in capsys.readouterr().out
    figures = json.loads((run.folder / "metrics.json").read_text())
    assert figures["settings"]["pairs_trained_on"] == 4
    likeness = figures["likeness to the target, embedded"]
    faithful = figures["faithfulness to the reference, embedded"]
    assert set(likeness) == {"the reference itself", "base", "tuned", "tuned, another's reference", "closed"}
    assert likeness["the reference itself"] == faithful["the target itself"]
    assert likeness["tuned"]["pictures"] == 8
    assert likeness["tuned"]["mean"] != likeness["tuned, another's reference"]["mean"]
    new = tmp_path / "new"
    (pairs / "targets").rename(new)
    for path in new.glob("*.png"):
        noise_image(50 + int(path.stem)).save(path)
    with pytest.raises(SystemExit):
        main(["evaluate", str(run.folder), "--images", str(new), *own])
    assert "give --references FOLDER" in capsys.readouterr().err
    main(["evaluate", str(run.folder), "--images", str(new), "--references", str(pairs / "before"), *own])
    assert json.loads((run.folder / "metrics.json").read_text())["settings"]["pairs_trained_on"] is None
    with pytest.raises(SystemExit):
        main(
            [
                "evaluate",
                str(run.folder),
                "--images",
                str(new),
                "--references",
                str(pairs / "before"),
                "--prompts",
                "object",
                *own,
            ]
        )
    assert "is of subjects" in capsys.readouterr().err


def test_references_are_hashed(folders, pairs, tmp_path):
    config = an_edit(folders("flux2-klein"), pairs, tmp_path / "run")
    samples = add_references(find_samples(config.images), config.references)
    items = collect_training_data(config, (samples, config.base)).items
    assert sum(name.startswith("reference 1 of") for name in items) == 4


def test_the_commands(folders, pairs, tmp_path, capsys):
    """`train edit` on pairs, `sample --reference`; each refuses what it has no place for."""
    base = str(folders("flux-kontext"))
    words = [
        "--base",
        base,
        "--images",
        str(pairs / "targets"),
        "--resolution",
        str(SIDE),
        "--steps",
        "1",
        "--rank",
        "2",
    ]
    words += ["--batch-size", "1", "--preview-every", "0", "--threads", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(["train", "edit", *words])
    assert "no reference: give --references FOLDER" in capsys.readouterr().err
    main(["train", "edit", *words, "--references", str(pairs / "before")])
    assert "pairs     1 references: 4 images" in capsys.readouterr().out
    shown = ["--steps", "1", "--width", str(SIDE), "--out", str(tmp_path / "made"), "--prompt", PROMPT]
    main(["sample", "--run", str(tmp_path / "run"), *shown, "--reference", str(pairs / "before" / "0.png")])
    assert (tmp_path / "made" / "000000.png").is_file()
    with pytest.raises(SystemExit):
        main(["sample", "--base", "tiny", *shown, "--reference", str(pairs / "before" / "0.png")])
    assert "takes none" in capsys.readouterr().err
