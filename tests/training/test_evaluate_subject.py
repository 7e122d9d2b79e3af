"""What a subject's adapter is worth: the figures, the page, the commands, and runs side by side."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import run_in_two_processes
from PIL import Image

from rankfold.apps.cli import main
from rankfold.pipelines.export import export_adapter
from rankfold.pipelines.generate import Recipe, generate, max_batch_size, sampling_pipeline
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.metrics import clip as metrics
from rankfold.toolkit.metrics.clip import ClipScorer
from rankfold.toolkit.metrics.dino import DinoScorer
from rankfold.training.evaluation.report import runs_page
from rankfold.training.evaluation.subject import draw, read_prompts, unrelated_prompts
from rankfold.training.launch.start import train


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    """A tiny ViT with random weights and its processor, as the hub has DINO's."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {token} {noun} on the beach\n\na large {token} {noun} in the snow\n")
    return file


def test_texts_share_batches_and_each_image_keeps_its_noise(base):
    """As many images as do not fit into one batch, each as it is when it is drawn alone."""
    recipe = Recipe(prompt="", base=str(base), seed=3, steps=2, width=32)
    pipe, texts = (
        sampling_pipeline(recipe),
        [f"a creature {place}" for place in ("left", "right", "top", "here", "there")],
    )
    drawn = draw(recipe, texts, 2, pipe)
    assert drawn.prompts == [text for text in texts for _ in range(2)]
    alone = [
        generate(replace(recipe, prompt=text, seed=3 + n), pipe=pipe)[0][0] for n, text in enumerate(drawn.prompts)
    ]
    for one, other in zip(drawn.images, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2


@pytest.mark.parametrize(("side", "count"), [(64, 8), (512, 8), (1024, 4), (2048, 1), (4096, 1)])
def test_large_images_are_drawn_fewer_at_once(side, count):
    assert max_batch_size(side) == count


def test_figures_by_hand():
    a = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), dim=-1)
    half = 2**-0.5
    torch.testing.assert_close(metrics.drift(a, a), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics.drift(a[:2], a[[1, 0]]), torch.ones(2))
    torch.testing.assert_close(metrics.diversity(a), torch.tensor([1 - half / 2, 1 - half / 2, 1 - half]))
    torch.testing.assert_close(metrics.nearest_similarity(a, a[:2]), torch.tensor([1.0, 1.0, half]))
    torch.testing.assert_close(metrics.leave_one_out_similarity(a), torch.tensor([half / 2, half / 2, half]))
    assert metrics.diversity(a[:1]).tolist() == [0.0]


def test_shipped_prompts():
    assert len(read_prompts("object")) == len(read_prompts("live")) == 25
    assert all("{token} {noun}" in line for name in ("object", "live", "world") for line in read_prompts(name))
    assert len(unrelated_prompts("world")) == len(unrelated_prompts("object")) == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog", "line 1: needs both"),
        ("", "is empty"),
        ("a {token} {noun}\na {thing}", "line 2: the only placeholders"),
    ],
)
def test_bad_prompt_files(tmp_path, text, words):
    file = tmp_path / "p.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_prompts(str(file))
    with pytest.raises(UserError, match="neither a file nor one of"):
        read_prompts("nowhere")


def test_dino_sees_what_transformers_does(dino):
    """Unit class tokens, the same in a batch as alone."""
    scorer = DinoScorer(str(dino))
    shown = [Image.effect_noise((40, 30 + 10 * n), 80).convert("RGB") for n in range(3)]
    found = scorer.embed_images(shown)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(found[1:2], scorer.embed_images(shown[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "words"), [(DinoScorer, "--dino"), (ClipScorer, "--clip")])
def test_backbones_that_are_not_there(tmp_path, kind, words):
    with pytest.raises(UserError, match=words):
        kind(str(tmp_path / "nowhere"))


def test_a_backbone_without_weights_is_refused():
    """open_clip would measure with random numbers."""
    with pytest.raises(UserError, match="does not say which weights: write ViT-B-32:openai"):
        ClipScorer("ViT-B-32")
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipScorer("ViT-B-32:nobody")


def test_a_run_is_measured(config, dino, prompts, images, tmp_path, capsys):
    run = train(replace(config, preservation_weight=0.0, learning_rate=0.05))
    words = ["--prompts", str(prompts), "--n", "2", "--steps", "2", "--dino", str(dino), "--clip", "embedded"]
    main(["evaluate", str(run.folder), "--images", str(images), *words])
    said = capsys.readouterr().out
    found = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    settings = found["settings"]
    assert settings["references_trained_on"] == settings["references"] == 5
    assert settings["backbones"] == ["embedded", str(dino)]
    for name in ("embedded", str(dino)):
        own = found[f"likeness, {name}"]
        assert own["tuned"]["pictures"] == 4
        assert own["tuned"]["mean"] != own["base"]["mean"]
        assert own["base"]["low"] <= own["base"]["mean"] <= own["base"]["high"]
    assert found["drift on unrelated prompts"]["tuned"]["mean"] > 1e-4
    assert 0 <= found["copies"]["copied"]["mean"] <= 1
    assert "closed" in said
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") > 20
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    with Image.open(run.folder / "pictures.png") as sheet:
        assert sheet.width > 8 * 64
    out = tmp_path / "two"
    run_in_two_processes(tmp_path, ["evaluate", str(run.folder), "--images", str(images), *words, "--out", str(out)])
    theirs = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for key in ("likeness, embedded", "prompt fidelity"):
        assert theirs[key]["tuned"] == pytest.approx(found[key]["tuned"], abs=2e-3)
    assert (tmp_path / "said1.txt").read_text(encoding="utf-8") == ""


def test_a_lora_file_is_measured(config, base, prompts, images, tmp_path, capsys):
    """The same figures as the run it came from; what a foreign file does not say is asked for."""
    run = train(replace(config, preservation_weight=0.0, learning_rate=0.05))
    file = export_adapter(run.adapter, str(base), "diffusers", tmp_path / "export").path
    words = ["--images", str(images), "--prompts", str(prompts), "--n", "1", "--steps", "2", "--clip", "embedded"]
    main(["evaluate", str(run.adapter), *words, "--out", str(tmp_path / "a")])
    main(["evaluate", str(file), *words, "--base", str(base)])
    one, other = (
        json.loads((f / "metrics.json").read_text(encoding="utf-8"))
        for f in (tmp_path / "a", file.with_name(f"{file.stem}-evaluation"))
    )
    for key in ("likeness, embedded", "prompt fidelity"):
        assert other[key]["tuned"]["mean"] == pytest.approx(one[key]["tuned"]["mean"], abs=1e-3)
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    with pytest.raises(SystemExit):
        main(["evaluate", str(bare), *words, "--base", str(base)])
    assert "does not say its token: give it with --token" in capsys.readouterr().err


def test_an_adapter_without_effect_measures_as_nothing(config, prompts, images, tmp_path):
    """Strength 0: no drift, nothing closed, the same prompt fidelity."""
    run = train(replace(config, steps=2))
    words = ["--prompts", str(prompts), "--n", "1", "--steps", "2", "--strength", "0", "--out", str(tmp_path / "out")]
    main(["evaluate", str(run.folder), "--clip", "embedded", *words])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert found["drift on unrelated prompts"]["tuned"]["mean"] == pytest.approx(0, abs=1e-5)
    likeness = found["likeness, embedded"]
    assert likeness["tuned"] == pytest.approx(likeness["base"], abs=1e-5)
    assert found["prompt fidelity"]["tuned"] == pytest.approx(found["prompt fidelity"]["base"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "does not exist: give a run folder, an adapter folder or a LoRA file"),
        (["nowhere", "--n", "0"], "--n must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", *words])
    assert says in capsys.readouterr().err


def test_a_real_base_asks_for_a_backbone(config, images, capsys):
    """The embedded CLIP knows drawn images only."""
    run = train(replace(config, steps=2))
    with pytest.raises(SystemExit):
        main(["evaluate", str(run.folder), "--images", str(images)])
    assert "--clip is missing" in capsys.readouterr().err


def test_runs_side_by_side(config, tmp_path):
    one = train(replace(config, out=tmp_path / "one", preview_every=3, preview_steps=2))
    two = train(replace(config, out=tmp_path / "two", rank=2))
    page = runs_page([one.folder, two.folder])
    assert "<svg" in page
    assert "Previews of one" in page
    assert "<td>rank</td><td>4</td><td>2</td>" in page
    assert "<td>base</td>" not in page
    main(["report", str(one.folder), str(two.folder), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(UserError, match="twice"):
        runs_page([one.folder, one.folder])
