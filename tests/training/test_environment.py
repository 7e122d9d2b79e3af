"""Where nothing can be written, read, opened or said: one sentence and exit code 2, or all is done; never a traceback."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import faults
import pytest
from settings import quick_config
from short_runs import write_config

from rankfold.pipelines.export import publish
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_atomic
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.config.subject import SubjectConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and permissions of POSIX")
ROOT_ONLY = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="takes what only root may")


@pytest.fixture
def place():
    """A folder that every user may look into."""
    folder = Path(tempfile.mkdtemp(prefix="environment-"))
    folder.chmod(0o777)
    yield folder
    faults.unmount(folder / "small")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def photos(place, images):
    """The images, where everybody may read them."""
    return Path(shutil.copytree(images, place / "photos"))


@pytest.fixture
def words(place, photos):
    """The words of a short training on the embedded model."""
    config = quick_config(
        SubjectConfig, images=photos, out=place / "run", steps=2, preview_every=0, preservation_weight=0, threads=1
    )
    return ["train", "subject", "--config", str(write_config(config, place / "config.yaml"))]


@pytest.fixture
def ended(place):
    """Carries out a command in a process; returns its exit code and the one sentence that it ended with."""

    def carry_out(words, before=None, **environment):
        environment = {"RANKFOLD_CACHE": str(place / "cache"), "RANKFOLD_LIBRARY": str(place / "library")} | environment
        code, said = faults.end_of(words, place / "said.txt", before, **environment)
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        told = [line for line in said.splitlines() if line.startswith("rankfold: ")]
        return code, told[-1] if told else ""

    (place / "cache").mkdir()
    (place / "cache").chmod(0o777)
    return carry_out


def spoil_nothing(place):
    return None


def make_readable_by_root_only(place):
    (place / "photos" / "0.png").chmod(0)


def make_read_only(place):
    (place / "closed").mkdir()
    (place / "closed").chmod(0o555)


REFUSED = {
    "a folder that cannot be written": ("closed/run", make_read_only, faults.without_privileges, "Permission denied"),
    "an image that cannot be read": (
        "run",
        make_readable_by_root_only,
        faults.without_privileges,
        "0.png: cannot be read (Perm",
    ),
    "a name too long": ("x" * 300, spoil_nothing, None, "File name too long"),
    "a path through a file": ("config.yaml/run", spoil_nothing, None, "Not a directory"),
}


@ROOT_ONLY
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, place, words, ended):
    out, spoil, before, sentence = REFUSED[name]
    spoil(place)
    code, said = ended(
        [*words, "--out", str(place / out)], before, **({"RANKFOLD_CACHE": ""} if name == "no home" else {})
    )
    assert code == 2
    assert sentence in said


@ROOT_ONLY
def test_no_home(ended):
    code, said = ended(["library", "list"], faults.without_home, RANKFOLD_LIBRARY="")
    assert code == 2
    assert "You have no home folder for ~/.rankfold/library: set the variable RANKFOLD_LIBRARY" in said
    assert ended(["doctor"], faults.without_home, RANKFOLD_CACHE="")[0] == 0


def test_a_deleted_working_folder(place, words, ended):
    code, said = ended([*words, "--out", "run"], partial(faults.in_deleted_folder, str(place / "gone")))
    assert code == 2
    assert "the folder that this was started in may have been deleted" in said


def test_a_run_whose_folder_is_deleted_says_so(place, words, ended):
    log = place / "said.txt"
    process = faults.start([*words, "--steps", "5000"], log, RANKFOLD_CACHE=str(place / "cache"))
    run = Run(place / "run")
    while process.is_alive() and run.status().get("state") != "running":
        time.sleep(0.05)
    shutil.rmtree(run.folder)
    process.join(120)
    assert process.exitcode == 2
    said = log.read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert "No such file or directory" in said


@ROOT_ONLY
def test_a_full_disk_ends_a_run_with_what_it_has(place, words, ended):
    if not faults.mount_tmpfs(place / "small", "4m"):
        pytest.skip("no disk can be mounted here")
    out = place / "small" / "run"
    code, said = ended(
        [*words, "--out", str(out), "--steps", "30", "--checkpoint-every", "2", "--keep-checkpoints", "20"]
    )
    assert code == 2
    assert "No space left on device" in said
    run = Run(out)
    kept = run.newest_step()
    assert 2 <= kept < 30
    assert not list(out.rglob(".*.tmp"))
    for path in run.checkpoint_files()[:-1]:
        path.unlink()
    config = out / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("keep_checkpoints: 20", "keep_checkpoints: 1"), encoding="utf-8"
    )
    assert ended(["resume", str(out)]) == (0, "")
    assert run.status()["step"] == 30


@ROOT_ONLY
@pytest.mark.parametrize("kind", ["read only", "through a file"])
def test_a_cache_that_cannot_be_written_is_done_without(kind, place, words, ended):
    make_read_only(place)
    cache = place / ("closed" if kind == "read only" else "config.yaml/x")
    assert ended(words, faults.without_privileges, RANKFOLD_CACHE=str(cache))[0] == 0
    assert Run(place / "run").state() == "done"
    assert "the cache cannot be written" in (place / "said.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["full", "closed", "gone"])
def test_output_that_cannot_be_written_ends_no_training(where, place, words, ended):
    before = {
        "full": partial(faults.output_to, "/dev/full"),
        "closed": partial(faults.output_to, ""),
        "gone": faults.output_to_nobody,
    }[where]
    code, said = ended(words, before)
    assert Run(place / "run").state() == "done"
    assert code == (2 if where == "full" else 0)
    if where == "full":
        assert "Not all output could be written: No space left on device. All else was done." in said
    for short in (["--help"], ["adapters"], ["train", "subject", "--help"]):
        assert ended(short, before)[0] in (0, 2)


def test_a_lost_terminal_ends_no_training(place, words, ended):
    process = faults.start([*words, "--steps", "60"], place / "said.txt", RANKFOLD_CACHE=str(place / "cache"))
    run = Run(place / "run")
    while process.is_alive() and run.status().get("state") != "running":
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGHUP)
    process.join(120)
    assert process.exitcode == 0
    assert run.status()["step"] == 60


def questions_run(place, photos, rows):
    """The words of a run on so many questions about the photos."""
    asked = [{"image": f"{number % 5}.png", "question": "What?", "answer": "red"} for number in range(rows)]
    (place / "data.json").write_text(json.dumps(asked), encoding="utf-8")
    words = ["train", "instruct", "--base", "tiny-vlm", "--data", place / "data.json", "--images", photos]
    return [*words, "--out", place / "task"]


def test_hardly_any_open_files(place, words, ended, photos):
    assert ended(words, faults.few_files)[0] == 0
    code, said = ended(questions_run(place, photos, rows=2), faults.few_files)
    assert code == 2
    assert "--workers 2 need more open files than the 24 that this shell allows" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
def test_names_that_are_no_text(place, words, ended):
    odd = os.fsdecode(os.fsencode(str(place / "x")) + b"\xff")
    assert ended([*words, "--out", odd])[0] == 0
    shutil.copytree(place / "photos", odd + "-photos")
    code, said = ended([*words, "--images", odd + "-photos", "--out", str(place / "run2")])
    assert code == 2
    assert "is no text" in said
    assert ended(["inspect", odd + "-photos"], faults.without_encoding)[0] == 0


@ROOT_ONLY
def test_a_small_shared_memory_is_said(place, photos, ended):
    """As containers have it: what workers read finds no room, and they say nothing."""
    talk = questions_run(place, photos, rows=64)
    code, said = ended([*talk, "--steps", "4", "--batch-size", "8", "--threads", "1"], faults.small_shared_memory)
    if code == 0:
        pytest.skip("no file system can be mounted here")
    assert code == 2
    assert "--workers 0" in said
    config = place / "task" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("workers: 2", "workers: 0"), encoding="utf-8")
    assert ended(["resume", place / "task"], faults.small_shared_memory)[0] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_devices_and_pipes_are_not_replaced(tmp_path):
    """As root, a file renamed to /dev/null would take its place, for every program of the machine."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(UserError, match="is no file but a device, a pipe or a socket"):
        write_atomic(pipe, b"x")
    (tmp_path / "made").write_bytes(b"x")
    with pytest.raises(UserError, match="is no file but a device, a pipe or a socket"):
        publish(tmp_path / "made", pipe)
    assert pipe.is_fifo()
