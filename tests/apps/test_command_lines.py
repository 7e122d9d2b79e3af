"""Every option of every command with values that people, scripts and accidents give: used, or one sentence and exit code 2."""

import shutil
import warnings
from pathlib import Path
from random import Random

import pytest
from command_lines import (
    FLOATS,
    GIVEN,
    all_commands,
    before_any_model,
    carry_out,
    command_lines,
    fill_in,
    make_workspace,
    options_of,
)

IN_GATE = 15  # lines of each command, of all that there are
NOT_A_NUMBER = FLOATS[:3]


@pytest.fixture(scope="module")
def places(base, images, tmp_path_factory):
    """What the words of command lines stand for."""
    from settings import quick_config

    from rankfold.pipelines.export import export_adapter
    from rankfold.training.config.instruct import InstructConfig
    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    root = tmp_path_factory.mktemp("lines")
    common = {"steps": 1, "batch_size": 1, "preview_every": 0, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run = train(quick_config(SubjectConfig, base=str(base), images=images, out=root / "run", **common))
        found = make_workspace(root / "made", run.folder, root / "task", root / "a.safetensors", images)
        data = {"base": "tiny-vlm", "data": found["DATA"], "images": images}
        train(quick_config(InstructConfig, out=root / "task", **data, **common))
        export_adapter(run.adapter, str(base), "kohya", root / "a.safetensors")
    return found


@pytest.fixture
def carried_out(places, tmp_path, monkeypatch, capfd):
    """Carries out a command line; returns its code and what it said, after it has been looked at."""
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / "library"))
    before_any_model(monkeypatch)
    (tmp_path / "here").mkdir()
    files = [Path(places[name]) / "status.json" for name in ("RUN", "TASK")]
    before = {file: file.read_text(encoding="utf-8") for file in files}

    def carry(words):
        monkeypatch.chdir(tmp_path / "here")
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, trace = carry_out(fill_in(words, places))
        said = capfd.readouterr().err
        shutil.rmtree(places["OUT"], ignore_errors=True)
        for status, text in before.items():  # where it had to go on, it could not
            status.write_text(text, encoding="utf-8")
        assert code in (0, 2, "model"), f"{words[:12]}\n{trace}"
        assert "Traceback" not in said, words
        return code, said

    return carry


@pytest.mark.parametrize("name", all_commands())
def test_wrong_lines_are_a_sentence(name, carried_out):
    lines = list(command_lines(name))
    for words in Random(name).sample(lines, min(IN_GATE, len(lines))):
        carried_out(words)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", all_commands())
def test_all_wrong_lines_are_a_sentence(name, carried_out):
    for words in command_lines(name):
        carried_out(words)


@pytest.mark.parametrize(
    "name", ["train subject", "train instruct", "compose", "search subject", "sample", "chat", "evaluate"]
)
def test_no_number_is_no_setting(name, carried_out):
    """Wherever a fraction is asked for: NaN adapters were saved with exit code 0."""
    from dataclasses import fields

    for field in fields(options_of(name)):
        if "loat" in str(field.type):
            for value in NOT_A_NUMBER:
                words = [*name.split(), *GIVEN[name].split(), f"--{field.name.replace('_', '-')}={value}"]
                code, said = carried_out(words)
                assert code == 2, words
                assert said.strip()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "train subject --images IMAGES --out OUT --seed 9223372036854775808",
            "--seed must be at most 9223372036854775807",
        ),
        ("train subject --images IMAGES --out OUT --preview-steps 5000", "this base has 1000 timesteps"),
        (
            "train subject --images IMAGES --out OUT --tracker wandb",
            "--tracker wandb is not installed: pip install wandb",
        ),
        ("compose RUN RUN --out OUT --weights nan nan", "--weights must be a finite number, not nan"),
        ("sample --run RUN --steps 5000", "this base has 1000 timesteps"),
        ("work --runs EMPTY --device ../../x --until-empty", "--device"),
    ],
)
def test_what_is_said(line, sentence, carried_out):
    code, said = carried_out(line.split())
    assert code == 2
    assert sentence in said


def test_braces_in_preview_prompts_are_braces(base, images, tmp_path):
    from settings import quick_config

    from rankfold.training.config.subject import SubjectConfig
    from rankfold.training.launch.start import train

    texts = ("a {token} {x} {", "{0} {token.__class__}")
    common = {"base": str(base), "images": images, "out": tmp_path / "run", "steps": 1, "batch_size": 1, "threads": 1}
    run = train(quick_config(SubjectConfig, preview_every=1, preview_steps=1, preview_prompts=texts, **common))
    assert len(list(run.samples.glob("*.png"))) == 2


def test_fewer_steps_than_are_done(config, capsys):
    from commands import expect_error

    from rankfold.training.launch.start import train

    run = train(config)
    text = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(text.replace("steps: 6", "steps: 2", 1), encoding="utf-8")
    capsys.readouterr()
    said = expect_error(capsys, "resume", run.folder)
    assert "has done 6 steps, and its config.yaml asks for 2: put 6 or more there" in said
    run.config_file.write_text(text.replace("steps: 6", "steps: 7", 1), encoding="utf-8")
    from rankfold.apps.cli import main

    main(["resume", str(run.folder)])
    assert run.status()["step"] == 7
