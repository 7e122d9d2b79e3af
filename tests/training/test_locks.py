"""Of two who begin, one runs: locks that end with their process, tried with real processes, killed ones and wrong clocks among them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from safetensors.torch import save_file
from torch import ones

from rankfold.toolkit.core import locks
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.launch import queue
from rankfold.training.launch.start import train
from rankfold.training.runs import library

TAKERS, ROUNDS = 4, 100

# Takes the lock in each round as soon as the round begins, writes down that it has it, and that it has it no more.
TAKE = """
import os, sys, time
from pathlib import Path
from rankfold.toolkit.core import locks
folder, number, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for round in range(rounds):
    file = folder / f"{round}.lock"
    if locks.acquire(file):
        owner = folder / f"{round}.owner"
        descriptor = os.open(owner, os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # ends with a traceback where two have it
        os.close(descriptor)
        time.sleep(0.002)
        owner.unlink()
        locks.release(file)
"""

HOLD = """
import os, sys, time
from pathlib import Path
from rankfold.toolkit.core.run_folder import Run
run = Run(Path(sys.argv[1]))
run.claim()
if sys.argv[2:] == ["fork"]:
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, b"the child is at work")
        time.sleep(60)
    os.read(reader, 1)
print("ready", flush=True)
time.sleep(60)
"""


def start(code, *words):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_of_many_has_it(tmp_path):
    processes = [start(TAKE, tmp_path, number, ROUNDS) for number in range(TAKERS)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0] * TAKERS


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_process_holds_nothing(tmp_path, how):
    """Nor does a child of it that lives on, as a reader of images does for some seconds."""
    run = Run(tmp_path / "run")
    process = start(HOLD, run.folder, how)
    assert run.is_live()
    assert run.state() == "starting"
    write_text(run.status_file, json.dumps(run.status() | {"born": 1.0, "beat": 1.0}))  # the clock was set meanwhile
    assert run.is_live()
    with pytest.raises(UserError, match=f"in use by a live run .process {process.pid}."):
        run.claim()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not run.is_live()
    assert run.state() == "lost"
    run.claim()
    assert run.state() == "starting"
    run.set_status(state="stopped")
    assert not locks.is_held(run.lock_file)


def test_two_starts_at_once_in_one_folder(config, tmp_path):
    """One runs to its end, the other is told so, at whichever moment it comes."""
    import forked
    from short_runs import write_config

    words = ["train", "subject", "--config", str(write_config(config, tmp_path / "run.yaml"))]
    for number in range(3):
        out = tmp_path / f"run{number}"
        logs = [tmp_path / f"said{number}-{which}.txt" for which in range(2)]
        both = [forked.start_process(forked.commands([*words, "--out", str(out)]), log) for log in logs]
        for process in both:
            process.join()
        said = [log.read_text() for log in logs]
        assert sorted(process.exitcode for process in both) == [0, 2], said
        assert "in use by a live run" in "".join(said) or "holds a run already" in "".join(said)
        steps = [row["step"] for row in Run(out).metrics()]
        assert steps == [2, 4, 6]


def test_a_run_that_came_and_went_meanwhile_is_not_cleared(config, monkeypatch):
    """Between the check of a folder and its claim another process may have begun there, and be done."""
    from rankfold.training.launch import start as launch

    prepare = launch.prepare_folder

    def late(run, *given):
        monkeypatch.setattr(launch, "prepare_folder", prepare)
        train(replace(config, seed=7))
        return prepare(run, *given)

    monkeypatch.setattr(launch, "prepare_folder", late)
    with pytest.raises(UserError, match="holds a run already, done at step 6 of 6"):
        train(config)
    assert Run(config.out).state() == "done"
    assert "seed: 7" in Run(config.out).config_file.read_text()


def test_a_worker_that_was_killed_leaves_nothing_behind(config, tmp_path):
    root = tmp_path / "runs"
    run = queue.enqueue(replace(config, out=root / "a"))
    code = """
import sys, time
from pathlib import Path
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.launch import queue
with queue.hold_lock(Path(sys.argv[1]) / f"{queue.WORKER}0.lock", "taken"):
    assert queue.claim_run(Run(Path(sys.argv[1]) / "a"))
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(code, root)
    assert queue.live_workers(root) == ["0"]
    assert not queue.claim_run(run)
    with pytest.raises(UserError, match="worker for device 0 is at work"):
        queue.run_worker(root, "0", until_empty=True)
    process.kill()
    process.wait()
    assert queue.live_workers(root) == []
    assert queue.claim_run(run)
    locks.release(run.claim_file)


def test_two_additions_of_one_name(tmp_path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": ones(2, 8), f"{name}.lora_B.weight": ones(8, 2)}, tmp_path / "a.safetensors")
    code = """
import sys
from pathlib import Path
from rankfold.toolkit.core.errors import UserError
from rankfold.training.runs import library
print("ready", flush=True)
sys.stdin.readline()
try:
    library.add(Path(sys.argv[1]), base="tiny", trigger=sys.argv[2])
except UserError as error:
    raise SystemExit(2 if "named a already" in str(error) else 1)
"""
    (tmp_path / "library" / f"{library.UNFINISHED}0").mkdir(parents=True)
    os.environ["RANKFOLD_LIBRARY"] = str(tmp_path / "library")
    try:
        processes = [start(code, tmp_path / "a.safetensors", number) for number in range(3)]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sorted(process.wait(60) for process in processes) == [0, 2, 2]
        assert [entry.name for entry in library.entries()] == ["a"]
        assert sorted(path.name for path in (tmp_path / "library").iterdir()) == [library.LOCK_FILE, "a"]
    finally:
        del os.environ["RANKFOLD_LIBRARY"]


def test_a_lock_file_that_was_deleted_is_made_again(tmp_path):
    file = tmp_path / "lock"
    assert locks.is_held(file) is None
    assert locks.acquire(file)
    assert locks.acquire(file)
    file.unlink()
    assert not locks.is_own(file)
    assert locks.acquire(file)
    assert locks.is_held(file)
    locks.release(file)
    assert locks.is_held(file) is False
    began = time.monotonic()
    locks.release(file)
    assert time.monotonic() - began < 1
