"""Nothing but our own words on a terminal, unless somebody asks for more or they are about a fault."""

import json
import logging
import os
import re
import subprocess
import sys
import types
import warnings

import pytest
from rich.console import Console
from rich.progress import Progress

from rankfold.apps.cli import entry as cli
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.terminal import QUIET, SETTINGS, OwnOutput, own_output_only, report_errors

pytestmark = pytest.mark.filterwarnings("ignore:a warning")

# What each command says, line by line.
NUMBER = r"-?[\d.,]+(e[+-]\d+)?"
OURS = [
    r"(rankfold|python|torch|torchvision|diffusers|transformers|accelerate|peft|open_clip_torch|gradio|safetensors) +\d\S*( on .*)?",
    r"\w+ +(there|not there \(optional: pip install \w+\))",
    rf"memory +{NUMBER} of {NUMBER} GiB free, \d+ cores",
    r"device +.*",
    r"will not work .* needs .*",
    rf"(hub )?cache +\S+ \({NUMBER} MiB\)",
    rf"disk +{NUMBER} GiB free here",
    r"ready",
    r"(settings|images|captions|sizes|preserved) +.*",
    rf"step \d+/\d+  loss {NUMBER}  {NUMBER} images/s  {NUMBER} GiB",
    r"Done: \S+",
    r"Next: rankfold .*",
    r"\S+\.(png|safetensors)",
    r"Read back by diffusers: \d+ layers, .*",
    r"It is exact\.",
]


def not_ours(text):
    return [line for line in text.splitlines() if line and not any(re.fullmatch(own, line) for own in OURS)]


def run_command(*words, code=None, **more):
    run = ["-c", code] if code else ["-m", "rankfold.apps.cli"]
    environment = {name: value for name, value in os.environ.items() if name not in {*QUIET, *SETTINGS}} | more
    return subprocess.run(
        [sys.executable, *run, *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env=environment,
    )


def test_the_doctor_says_its_own_words(tmp_path):
    done = run_command("doctor", HF_HOME=str(tmp_path))
    assert done.returncode == 0
    assert not not_ours(done.stdout)
    assert done.stderr == ""


def test_a_run_from_training_to_the_file(images, tmp_path):
    """In 4 bit and with an optimizer that prints, so that every library is there; nothing of them is seen."""
    out = tmp_path / "run"
    settings = [
        "--steps",
        2,
        "--batch-size",
        1,
        "--threads",
        1,
        "--preview-every",
        1,
        "--preview-steps",
        1,
        "--quantize",
        "nf4",
    ]
    commands = [
        ["train", "subject", "--images", images, "--out", out, *settings, "--optimizer", "Prodigy", "--learning-rate", 1],
        ["sample", "--run", out, "--steps", 1, "--out", tmp_path / "made"],
        ["export", out],
    ]  # fmt: skip
    code = "import json, sys; from rankfold.apps.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
    done = run_command(json.dumps([[str(word) for word in words] for words in commands]), code=code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not not_ours(done.stdout)
    assert not not_ours(done.stderr)
    assert len(done.stdout.splitlines()) == 11
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- the mechanism


@pytest.fixture
def library(monkeypatch):
    """A module of somebody else's that speaks in every way there is."""
    module = types.ModuleType("noisy.library")
    monkeypatch.setitem(sys.modules, "noisy.library", module)
    code = """
import logging, sys, warnings
log = logging.getLogger("noisy.library")

def speak(handler=None):
    if handler:
        log.addHandler(handler(sys.stderr))
    print("a print")
    sys.stderr.write("a cry\\n")
    sys.stdout.writelines(["one line\\n", "and another\\n"])
    warnings.warn("a warning")
    log.warning("a logged warning")

def err():
    log.error("a logged error")
"""
    exec(compile(code, "noisy/library.py", "exec"), module.__dict__)
    yield module
    module.log.handlers.clear()


def say(text):
    """Prints as a module of ours does."""
    exec("print(text)", {"__name__": "rankfold.apps.cli.demo", "text": text})


def test_a_library_is_not_heard(library, capsys):
    with own_output_only():
        library.speak(logging.StreamHandler)
        say("ours")
        Console(stderr=True).print("ours, by rich")
    assert capsys.readouterr() == ("ours\n", "ours, by rich\n")


def test_an_error_of_a_library_is_heard(library, capsys):
    with own_output_only():
        library.log.addHandler(logging.StreamHandler(sys.stderr))
        library.err()
    assert capsys.readouterr().err == "a logged error\n"


def test_a_library_is_heard_when_asked_for(library, capsys):
    with warnings.catch_warnings(), own_output_only(verbose=True):
        warnings.simplefilter("always")
        library.speak(logging.StreamHandler)
    out, err = capsys.readouterr()
    assert out == "a print\none line\nand another\n"
    assert "a cry" in err
    assert "a logged warning" in err


def test_a_library_is_heard_before_a_fault(library, capsys):
    @report_errors()
    def command():
        library.speak()
        1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        command()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rankfold: the libraries said last:\n  a print\n  a cry\n  one line\n")


def test_a_library_is_not_heard_before_a_mistake(library, capsys):
    @report_errors()
    def command():
        library.speak()
        raise UserError("--rank must be at least 1, not 0.")

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == "rankfold: --rank must be at least 1, not 0.\n"


def test_while_a_bar_is_drawn(library, capsys):
    """rich takes the streams over then; whose words they are still counts."""
    with own_output_only(), Progress(console=Console(stderr=True, force_terminal=True)) as bar:
        bar.add_task("training")
        library.speak()
        say("ours")
    out, err = capsys.readouterr()
    assert "training" in err
    assert "ours" in out + err
    assert "a print" not in out + err
    assert "a cry" not in out + err


def test_everything_is_as_before(library, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    for name in QUIET:
        if name != "TRANSFORMERS_VERBOSITY":
            monkeypatch.delenv(name, raising=False)
    streams, environment, level = (sys.stdout, sys.stderr), dict(os.environ), logging.root.manager.disable
    with own_output_only():
        assert isinstance(sys.stdout, OwnOutput)
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"  # what the user has set stays
        assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    assert ((sys.stdout, sys.stderr), dict(os.environ), logging.root.manager.disable) == (streams, environment, level)


def test_verbose_is_an_option_of_every_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(cli, "run_command", lambda words: seen.append((words, "RANKFOLD_VERBOSE" in os.environ)))
    cli.main(["sample", "--verbose", "--n", "2"])
    cli.main(["--verbose", "doctor"])
    cli.main(["doctor"])
    assert seen == [(["sample", "--n", "2"], True), (["doctor"], True), (["doctor"], False)]
    cli.main(["--verbose", "--help"])
    assert "--verbose" in capsys.readouterr().out
