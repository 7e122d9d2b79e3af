"""The command line: quick answers, and one sentence with exit code 2 for every mistake, before a model is loaded."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import expect_error
from PIL import Image

from rankfold.apps.cli import main
from rankfold.apps.cli.options import parse_options
from rankfold.training.config.subject import SubjectConfig


@pytest.fixture
def train(images, base, tmp_path, monkeypatch):
    """A train command; loading any model makes the test fail."""
    from rankfold.training.subject import training as training_images

    def loaded(*arguments):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(training_images, "open_model", loaded)
    return ["train", "subject", "--images", images, "--base", base, "--out", tmp_path / "run"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "mosslora"], "Did you mean 'moslora'"),
        (["--rank", "0"], "--rank"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--steps", "0"], "--steps"),
        (["--images", "nowhere"], "nowhere"),
        (["--base", "nowhere/at/all"], "neither a pipeline folder, nor a checkpoint"),
        (["--base", "nobody/no-such-model"], "--base tiny"),
        (["--optimizer", "AdamV"], "Did you mean 'Adam"),
        (["--lr-scheduler", "cosin"], "Did you mean 'cosine'"),
        (["--adapter-options", "mixr", "frozen"], "Did you mean 'mixer'"),
        (["--adapter-options", "mixr=frozen"], "Did you mean 'mixer'"),
        (["--adapter", "oft", "--alpha", "2"], "oft has no alpha: leave --alpha out"),
        (["--adapter", "peanut", "--dropout", "0.1"], "peanut has no dropout: leave --dropout out"),
        (["--precision", "fp16"], "fp16"),
        (["--token", " "], "--token"),
        (["--resolution", "70"], "--resolution 70 cannot be divided by 8"),
        (["--resolution", "65536"], "--resolution must be at most 16384"),
        (["--timestep-shift", "0"], "--timestep-shift must be above 0"),
    ],
)
def test_mistakes(capsys, train, options, words):
    assert words in expect_error(capsys, *train, *options)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--adapter-options", "a=1", "b", "x=y", "c=d=e"], {"a": "1", "b": "x=y", "c": "d=e"}),
        (["--adapter-options=a=1", "b=2"], {"a": "1", "b": "2"}),
        (["--adapter-options", "mixer", "frozen"], {"mixer": "frozen"}),
    ],
)
def test_options_of_an_adapter_are_pairs(words, options):
    read = parse_options(SubjectConfig, ["--images", "photos", *words, "--out", "a=b"], "train subject")
    assert (read.adapter_options, read.out) == (options, Path("a=b"))


def test_base_folder_that_is_no_pipeline(capsys, train, tmp_path):
    assert "no model_index.json" in expect_error(capsys, *train, "--base", tmp_path)


def test_base_of_no_family(capsys, train, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusion4Pipeline"}')
    said = expect_error(capsys, *train, "--base", tmp_path)
    assert "Did you mean 'StableDiffusionPipeline'" in said
    assert "docs/families.md" in said
    index.write_text('{"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}')
    assert "transformer/ is missing" in expect_error(capsys, *train, "--base", tmp_path)


def test_gated_base(capsys, train, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def raise_gated(*arguments, **named):
        raise GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "https://localhost")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_gated)
    assert "accept its terms" in expect_error(capsys, *train, "--base", "somebody/gated")


def test_target_that_matches_no_layer(capsys, images, base, tmp_path):
    words = [
        "train",
        "subject",
        "--images",
        images,
        "--base",
        base,
        "--out",
        tmp_path / "r",
        "--target-modules",
        "to_x",
        "--class-noun",
        "cat",
    ]
    message = expect_error(capsys, *words)
    assert "to_x" in message
    assert "to_q" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps: 3", "Did you mean 'steps'"),
        ("steps: many", "'steps' cannot be 'many'"),
        ("- 1", "name: value"),
        ("a: [", "not valid YAML"),
        ("rank: 4\nrank: 8", "has 'rank' twice, the second time in line 2"),
        ("steps: yes", "'steps' is no switch"),
        ("export: kohya", "Write a list: `export: [kohya]`"),
    ],
)
def test_bad_yaml(capsys, tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert words in expect_error(capsys, "train", "subject", "--config", file)


def test_command_line_overrides_yaml(tmp_path, images, base, monkeypatch, capsys):
    from rankfold.training.launch import start

    seen = []
    monkeypatch.setattr(start, "preflight", lambda config: seen.append(config) or 1 / 0)
    file = tmp_path / "run.yaml"
    file.write_text(f"images: {images}\nbase: {base}\nrank: 2\nsteps: 7\n")
    with pytest.raises(ZeroDivisionError):
        main(["train", "subject", "--config", str(file), "--rank", "3"])
    assert (seen[0].rank, seen[0].steps) == (3, 7)


def test_unknown_commands(capsys):
    assert "Did you mean 'sample'" in expect_error(capsys, "sampel")
    assert "train subject" in expect_error(capsys, "train")
    assert "is not a run folder" in expect_error(capsys, "resume", "nowhere")
    assert "--prompt is missing" in expect_error(capsys, "sample")


def best_of(code, n=5):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_and_import_are_quick():
    assert best_of(["-m", "rankfold.apps.cli", "--help"]) < 0.5
    assert best_of(["-c", "import rankfold"]) < 0.3


@pytest.mark.parametrize("command", ["train subject", "sample", "export", "resume", "stop", "demo"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as error:
        main([*command.split(), "--help"])
    assert error.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_version_and_adapters(capsys):
    main(["--version"])
    main(["adapters"])
    out = capsys.readouterr().out
    assert "rankfold 0." in out
    assert "moslora" in out


@pytest.mark.parametrize("method", ["instruct", "search", "compose"])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_config_of_another_method(capsys, tmp_path, command, method):
    file = tmp_path / "c.yaml"
    file.write_text(f"method: {method}\n")
    assert f"of another method ({method})" in expect_error(capsys, command, "subject", "--config", file)


def test_a_schedule_that_needs_rules(capsys, train):
    assert "needs rules" in expect_error(capsys, *train, "--lr-scheduler", "piecewise_constant")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "photos",
            ["--layers", "--max-length", "9"],
            "--max-length, --layers would have no effect on a folder of images",
        ),
        ("rows.jsonl", ["--token", "sks"], "--token would have no effect on conversations"),
        ("lora.safetensors", ["--rows", "2"], "--rows would have no effect on an adapter"),
    ],
)
def test_inspect_refuses_options_of_something_else(capsys, tmp_path, kind, options, words):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    for name in ("rows.jsonl", "lora.safetensors"):
        (tmp_path / name).write_text("")
    assert words in expect_error(capsys, "inspect", tmp_path / kind, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compare"], "--compare shows the base beside a tuned model"),
        (["--video-frames", "4"], "--video-frames is of videos"),
        (["--strength", "0.5"], "--strength says how strong adapters are"),
    ],
)
def test_chat_refuses_options_without_effect(capsys, options, words):
    assert words in expect_error(capsys, "chat", "What?", *options)
