"""Windows, macOS and Linux: a run where nothing of POSIX is to be had, paths, texts and names of other systems."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath

import pytest

from rankfold.toolkit.core import systems
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.paths import expand_paths, is_hub_id, is_path, path_from_uri, windows_name_fault
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.core.texts import read_lines, read_text
from rankfold.toolkit.data.conversations import read_conversations
from rankfold.toolkit.data.images import parse_source
from rankfold.toolkit.data.subjects import find_samples
from rankfold.toolkit.diffusion.load import resolve_base
from rankfold.toolkit.vlm.model import resolve_vision_base
from rankfold.training.config.checks import check_folder_names
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.evaluation.subject import read_prompts

ROOT = Path(__file__).parents[2]
SAYING = "a sks creature, größer · 猫"  # letters that cp1252 has, and some that it has not


# ---------------------------------------------------------------------------------------------- a run elsewhere


@pytest.fixture
def elsewhere(tmp_path):
    """Starts a command where POSIX is hidden, the console speaks cp1252, and texts without an encoding are errors."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "elsewhere"), str(ROOT.parent)]),
        "PYTHONIOENCODING": "cp1252",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "PYTHONWARNDEFAULTENCODING": "1",
    }

    def start(*words, code=None):
        run = ["-c", code] if code else ["-m", "rankfold.apps.cli"]
        command = [sys.executable, *run, *map(str, words)]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="cp1252"
        )

    return start


def wait_for_output(process):
    """What a process printed, once it has ended well."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-6000:]
    return said


def test_what_is_hidden_is_hidden(elsewhere):
    """The ground that the next tests stand on."""
    code = (
        "import os, signal, resource, locale, warnings; assert os.fork and signal.SIGKILL\n"
        "import multiprocessing; assert multiprocessing.get_start_method() == 'spawn'\n"
        "space = {'__name__': 'rankfold.toolkit.x', '__package__': 'rankfold.toolkit'}\n"
        "exec('import os, signal', space); own = space['os'], space['signal']\n"
        "assert own[0].environ is os.environ and not hasattr(own[0], 'fork') and not hasattr(own[1], 'SIGKILL')\n"
        "try: exec('import resource', space); raise SystemExit('resource is there')\n"
        "except ModuleNotFoundError: pass\n"
        "try: exec('open(os.devnull)', space); raise SystemExit('an encoding is guessed')\n"
        "except EncodingWarning: pass\n"
        "print(locale.getencoding())"
    )
    assert "utf" not in wait_for_output(elsewhere(code=code)).lower()


def test_a_run_without_posix(elsewhere, images, tmp_path):
    """Trained, stopped, resumed, sampled and exported, with captions and a config as a Windows editor writes them."""
    photos = tmp_path / "my photos"
    photos.mkdir()
    for number, file in enumerate(sorted(images.iterdir())[:2]):
        (photos / file.name).write_bytes(file.read_bytes())
        (photos / f"{file.stem}.txt").write_bytes(b"\xef\xbb\xbf" + f"{SAYING} {number}\r\n".encode())
    settings = ("--batch-size", 1, "--rank", 2, "--threads", 1, "--log-every", 1, "--preview-steps", 1)
    out = tmp_path / "runs" / "mine"
    text = f"images: {photos}\r\nsteps: 100000\r\npreview_every: 2\r\ncheckpoint_every: 2\r\npreview_prompts: ['{SAYING}']\r\n"
    (tmp_path / "c.yaml").write_bytes(text.encode())
    running = elsewhere("train", "subject", "--config", tmp_path / "c.yaml", "--out", out, *settings)
    run, until = Run(out), time.time() + 120
    while not run.checkpoint_files() and running.poll() is None and time.time() < until:
        time.sleep(0.1)
    assert running.poll() is None, running.communicate()[0][-6000:]
    assert "stop after this step" in wait_for_output(elsewhere("stop", out))
    said = wait_for_output(running)
    assert "Stopped at step" in said
    assert run.status()["state"] == "stopped"
    assert list(run.samples.glob("*.png"))
    assert b"\r" not in run.metrics_file.read_bytes() + run.log_file.read_bytes()

    step = run.status()["step"]
    text = run.config_file.read_text(encoding="utf-8").replace("steps: 100000", f"steps: {step + 1}")
    run.config_file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    commands = [
        ["resume", out],
        ["sample", "--run", out, "--prompt", SAYING, "--steps", 1, "--out", tmp_path / "made"],
        ["export", out],
        ["inspect", out],
    ]
    code = "import json, sys; from rankfold.apps.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
    said = wait_for_output(elsewhere(json.dumps([[str(word) for word in words] for words in commands]), code=code))
    assert run.status()["state"] == "done"
    assert run.status()["step"] == step + 1
    assert (tmp_path / "made" / "000000.png").is_file()
    assert "It is exact." in said


@pytest.mark.slow
def test_a_queue_and_readers_without_posix(elsewhere, images, tmp_path):
    """A worker, the process of a run, and processes that read images: each started again, as where nothing can be forked."""
    rows = [{"image": f"photos\\{n}.png", "question": "What is it?", "answer": SAYING} for n in range(4)]
    (tmp_path / "photos").mkdir()
    for row in rows:
        name = row["image"].split("\\")[1]
        (tmp_path / "photos" / name).write_bytes((images / name).read_bytes())
    (tmp_path / "data.jsonl").write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    config = f"method: instruct\r\ndata: {tmp_path / 'data.jsonl'}\r\nout: {tmp_path / 'runs' / 'x'}\r\nsteps: 2\r\nworkers: 1\r\n"
    (tmp_path / "c.yaml").write_bytes(config.encode())
    wait_for_output(elsewhere("queue", tmp_path / "c.yaml"))
    wait_for_output(elsewhere("work", "--runs", tmp_path / "runs", "--until-empty"))
    run = Run(tmp_path / "runs" / "x")
    assert run.status()["state"] == "done", (run.folder / "output.txt").read_text(encoding="utf-8")


def test_letters_that_the_console_lacks(elsewhere):
    """A mistake is told in one line, in whatever letters."""
    process = elsewhere("sample", "--prompt", "x", "--adapters", "猫")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith("rankfold: ")
    assert "Traceback" not in said


def test_every_text_says_its_encoding():
    """ruff's PLW1514 sees what is plainly a path; this sees every call of these names."""
    guessed = []
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] not in ("toolkit", "pipelines", "training", "apps", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
                guessed.append(f"{file.name}:{node.lineno}")
    assert not guessed


# ---------------------------------------------------------------------------------------------- files and processes


def test_a_file_that_somebody_has_open(monkeypatch, tmp_path):
    """Windows refuses it for a moment; elsewhere a refusal is one at once."""
    tries = []

    def refused(source, target):
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError("somebody reads it")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(systems.os, "replace", refused)
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr(systems, "LOCK_TIMEOUT", 0.0)
    with pytest.raises(PermissionError):
        systems.replace_file(tmp_path / "new", tmp_path / "old")
    monkeypatch.setattr(systems, "LOCK_TIMEOUT", 2.0)
    systems.replace_file(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert len(tries) == 3


def test_a_process_of_its_own():
    assert systems.detached_process_kwargs(windows=True) == {"creationflags": 0x08000200}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], **systems.detached_process_kwargs())
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        child.kill()
        child.wait()


def test_peak_memory_without_resource(monkeypatch):
    whole = systems.peak_rss()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert (
        0.2 * whole < systems.peak_rss() <= 1.2 * whole
    )  # psutil knows a peak on Windows only, here what there is now


# ---------------------------------------------------------------------------------------------- paths and names


@pytest.mark.parametrize(
    ("text", "hub", "path"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True, True),
        ("nobody/no-such.model", True, True),
        (r"C:\models\sd", False, True),
        ("C:/models", False, True),
        (r"models\sd", False, True),
        ("~/model", False, True),
        ("./model", False, True),
        ("a/b/c", False, True),
        ("mine", False, False),
    ],
)
def test_hub_ids_and_paths(text, hub, path):
    assert is_hub_id(text) == hub
    assert is_path(text) == path


@pytest.mark.parametrize("base", [r"C:\models\sd", "C:/models", r"models\sd", "~nobody/model"])
def test_a_base_that_is_a_path_is_not_looked_for_on_the_hub(base, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **n: pytest.fail("the hub was asked"))
    for resolve in (resolve_base, resolve_vision_base):
        with pytest.raises(UserError, match="neither"):
            resolve(base)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = SubjectConfig(
        out=Path("~/runs/x"), images=Path("~") / "photos", masks="~/masks", also={"a cat": r"~\cats"}
    )
    assert (config.out, config.images) == (tmp_path / "runs" / "x", tmp_path / "photos")
    assert (config.masks, config.also) == (str(tmp_path / "masks"), {"a cat": str(tmp_path / "cats")})
    (tmp_path / "c.yaml").write_text("out: ~/y\nbase: ~/model\n", encoding="utf-8")
    config = from_yaml(Path("~/c.yaml"))
    assert (config.out, config.base) == (tmp_path / "y", str(tmp_path / "model"))
    assert expand_paths(("~nobody-here/x", "a ~ b", Path("x~"))) == ("~nobody-here/x", "a ~ b", Path("x~"))


@pytest.mark.parametrize(
    ("address", "windows", "path"),
    [
        ("file:///C:/photos/a%20b.png", True, "C:/photos/a b.png"),
        ("file://host/share/a.png", True, "//host/share/a.png"),
        ("file:///home/me/a%20b.png", False, "/home/me/a b.png"),
        ("file://localhost/a.png", False, "/a.png"),
    ],
)
def test_file_addresses(address, windows, path):
    assert path_from_uri(address, windows=windows) == path


def test_images_with_backslashes(images, tmp_path):
    assert parse_source(f"{images.name}\\0.png", images.parent) == images / "0.png"
    assert parse_source((images / "0.png").as_uri(), None) == images / "0.png"
    (tmp_path / "a b%20c.png").write_bytes((images / "0.png").read_bytes())
    assert parse_source((tmp_path / "a b%20c.png").as_uri(), None).name == "a b%20c.png"
    with pytest.raises(UserError, match=r"there is no image .*C:\\photos\\a.png"):
        parse_source(r"C:\photos\a.png", None)


@pytest.mark.parametrize("name", ["con", "NUL.txt", "a:b", "x.", "y ", "COM1", "what?", 'a"b'])
def test_names_that_windows_refuses(name):
    assert windows_name_fault(name)
    with pytest.raises(UserError, match="Windows has no folder"):
        check_folder_names(PureWindowsPath(f"C:/runs/{name}/x"), windows=True)
    check_folder_names(Path("runs") / name, windows=False)


@pytest.mark.parametrize("out", [r"C:\Users\me\runs\x", r"\\host\share\run", r"..\runs\my-run.2", "runs/console"])
def test_folders_that_windows_has(out):
    check_folder_names(PureWindowsPath(out), windows=True)


def test_a_config_moves_between_systems(tmp_path):
    config = SubjectConfig(images=Path("photos") / "dog", out=Path("runs") / "x")
    assert "images: photos/dog\n" in to_yaml(config)
    for line in (r"images: C:\photos\new", r"images: 'C:\photos\new'"):
        (tmp_path / "c.yaml").write_text(line, encoding="utf-8")
        assert str(from_yaml(tmp_path / "c.yaml").images) == r"C:\photos\new"
    (tmp_path / "c.yaml").write_text(r'images: "C:\photos"', encoding="utf-8")
    with pytest.raises(UserError, match="without quotes"):
        from_yaml(tmp_path / "c.yaml")


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_any_editor(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes(f"{SAYING}\r\ntwo\u2028lines\rthree\n".encode(encoding))
    assert read_lines(tmp_path / "x.txt") == [SAYING, "two\u2028lines", "three", ""]


def test_texts_in_another_encoding(tmp_path):
    (tmp_path / "x.txt").write_bytes("größer".encode("cp1252"))
    with pytest.raises(UserError, match=r"x\.txt is not text in UTF-8"):
        read_text(tmp_path / "x.txt")


def test_data_files_as_windows_writes_them(images, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((images / "0.png").read_bytes())
    (tmp_path / "0.txt").write_bytes(f"{SAYING}\r\n".encode("utf-16"))
    rows = [{"file_name": f".\\{n}.png", "text": f"{SAYING}\u2028{n}"} for n in (1, 2)]
    table = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + table.encode())
    assert [sample.caption for sample in find_samples(tmp_path)] == [SAYING, *(row["text"] for row in rows)]

    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa {token} {noun} asleep\r\n\r\na {token} {noun} awake\r\n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ("a {token} {noun} asleep", "a {token} {noun} awake")

    row = {"image": "0.png", "question": SAYING, "answer": "yes"}
    for name, encoding in (("data.json", "utf-16"), ("more.json", "utf-8-sig")):
        (tmp_path / name).write_bytes(
            json.dumps([row], ensure_ascii=False, indent=1).replace("\n", "\r\n").encode(encoding)
        )
        assert read_conversations(tmp_path / name).rows[0].messages[0]["content"][1]["text"] == SAYING
    (tmp_path / "data.json").write_text(r'[{"image": "photos\dog.png"}]', encoding="utf-8")
    with pytest.raises(UserError, match="backslashes are written twice"):
        read_conversations(tmp_path / "data.json")
