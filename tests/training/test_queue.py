"""The queue: runs wait, a worker carries them out one by one, and whatever dies on the way is said plainly."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import psutil
import pytest

from rankfold.apps.cli import main
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.files import write_text
from rankfold.toolkit.core.run_folder import Run, is_process_alive
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.launch import queue
from rankfold.training.launch.start import train


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def worker(root):
    """Starts workers as a user does, and ends whatever they have left."""
    started = []

    def start(device="0", *more):
        words = [sys.executable, "-m", "rankfold.apps.cli", "work", "--runs", str(root), "--device", device, *more]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for run in queue.list_runs(root):
        if run.is_live():
            psutil.Process(run.status()["pid"]).kill()


@pytest.mark.slow
def test_the_oldest_run_goes_first_and_equals_one_that_did_not_wait(config, root, worker):
    from short_runs import adapter

    plain = train(replace(config, out=root.parent / "plain"))
    runs = [queue.enqueue(replace(config, out=root / name, seed=seed)) for name, seed in (("b", 0), ("a", 1))]
    assert [run.state() for run in runs] == ["queued", "queued"]
    assert [run.folder.name for run in queue.queued_runs(root)] == ["b", "a"]
    said, _ = worker("0", "--until-empty").communicate(timeout=240)
    assert "2 runs were carried out" in said
    assert [run.state() for run in runs] == ["done", "done"]
    assert runs[0].status()["beat"] < runs[1].status()["beat"]
    own, other = adapter(runs[0].folder), adapter(plain.folder)
    assert all((own[key] == other[key]).all() for key in own)
    assert not queue.live_workers(root)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_the_next_one_goes_on(config, images, root, worker):
    bad = queue.enqueue(replace(config, out=root / "bad", learning_rate=1e30))
    good = queue.enqueue(replace(config, out=root / "good"))
    worker("0", "--until-empty").communicate(timeout=240)
    assert (bad.state(), good.state()) == ("failed", "done")
    assert "loss is not finite" in bad.status()["error"]
    assert "loss is not finite" in (bad.folder / queue.OUTPUT_FILE).read_text(encoding="utf-8")


def test_what_can_be_checked_is_refused_at_once(config, root):
    with pytest.raises(UserError, match="--rank must be at least 1"):
        queue.enqueue(replace(config, out=root / "a", rank=0))
    assert not (root / "a").exists()
    queue.enqueue(replace(config, out=root / "a"))
    with pytest.raises(UserError, match="holds a run already, waiting in the queue: carry it out with `rankfold work"):
        queue.enqueue(replace(config, out=root / "a"))
    (root / "b").mkdir()
    (root / "b" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already: choose another name"):
        queue.enqueue(replace(config, out=root / "b"))


@pytest.mark.slow
def test_a_config_that_was_broken_by_hand_fails_with_its_sentence(config, root, worker):
    run = queue.enqueue(replace(config, out=root / "a"))
    write_text(run.config_file, run.config_file.read_text(encoding="utf-8").replace("rank: 4", "rnk: 4"))
    worker("0", "--until-empty").communicate(timeout=240)
    assert run.state() == "failed"
    assert "unknown key 'rnk'" in run.status()["error"]


@pytest.mark.slow
def test_a_killed_run_is_lost_and_goes_on(config, root, worker):
    """kill -9 of the run's process: lost, then queued again, then as if nothing had been."""
    from short_runs import adapter

    whole = train(replace(config, steps=40, out=root.parent / "whole"))
    run = queue.enqueue(replace(config, steps=40, out=root / "a"))
    worker()
    wait_for(lambda: run.checkpoint_files())
    os.kill(run.status()["pid"], signal.SIGKILL)
    wait_for(lambda: run.state() == "lost")
    queue.requeue(run)
    wait_for(lambda: run.state() == "done")
    steps = [row["step"] for row in run.metrics()]
    assert steps == sorted(set(steps))
    own, other = adapter(run.folder), adapter(whole.folder)
    assert all((own[key] == other[key]).all() for key in own)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kills_at_any_moment_lose_nothing(config, root, worker, seed):
    """Worker, run, or both are killed again and again at moments by chance; in the end all is as if nothing had been."""
    from short_runs import adapter

    random = Random(seed)
    whole = train(replace(config, steps=200, out=root.parent / "whole"))
    run = queue.enqueue(replace(config, steps=200, out=root / "a"))
    for _ in range(4):
        one = worker()
        time.sleep(random.uniform(0.5, 12))
        victims = random.choice(("worker", "run", "both"))
        if victims != "run":
            one.kill()
            one.wait()
        if victims != "worker" and run.is_live():
            os.kill(run.status()["pid"], signal.SIGKILL)
        one.kill()
        one.wait()
        wait_for(lambda: run.state() in ("queued", "lost", "running", "starting", "done"))
        steps = [row["step"] for row in run.metrics()]
        assert steps == sorted(set(steps))
        wait_for(lambda: not run.is_live(), 400)
        if run.state() == "lost":
            queue.requeue(run)
    if run.state() != "done":
        worker("0", "--until-empty").communicate(timeout=240)
    assert run.state() == "done"
    steps = [row["step"] for row in run.metrics()]
    assert steps == sorted(set(steps))
    own, other = adapter(run.folder), adapter(whole.folder)
    assert all((own[key] == other[key]).all() for key in own)
    assert not list(run.folder.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_killed_worker_leaves_its_run_at_work(config, root, worker):
    """The run goes on; the next worker waits for it, since the device is taken."""
    first, second = (queue.enqueue(replace(config, steps=s, out=root / n)) for n, s in (("a", 150), ("b", 6)))
    one = worker()
    wait_for(lambda: first.state() == "running")
    one.kill()
    one.wait()
    assert queue.live_workers(root) == []
    other = worker("0", "--until-empty")
    time.sleep(3)
    assert first.state() == "running"
    assert second.state() == "queued"
    other.communicate(timeout=240)
    assert (first.state(), second.state()) == ("done", "done")


@pytest.mark.slow
def test_a_second_process_for_a_run_leaves_it_alone(config, root):
    """As a worker that was killed just after it had started one, and the next worker, would make them."""
    run = queue.enqueue(replace(config, steps=20, out=root / "a"))
    words = [sys.executable, "-m", "rankfold.training.launch.run_queued", str(run.folder)]
    first = subprocess.Popen(words)
    wait_for(lambda: run.state() != "queued")
    second = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert "in use by a live run" in second.stderr or "does not wait" in second.stderr
    assert run.status()["pid"] == first.pid
    assert run.state() in ("starting", "running")
    assert first.wait(240) == 0
    rows = run.metrics()
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == 2
    assert run.state() == "done"
    assert run.metrics() == rows
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))


def test_a_worker_is_small(root):
    """It takes a second to start and holds neither torch nor what comes with it."""
    code = "import sys; from rankfold.apps.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["work", "--runs", str(root), "--until-empty"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_worker_for_a_device(root, worker):
    one = worker()
    wait_for(lambda: queue.live_workers(root) == ["0"])
    with pytest.raises(UserError, match="worker for device 0 is at work"):
        queue.run_worker(root, "0", until_empty=True)
    assert queue.run_worker(root, "1", until_empty=True) == 0
    one.terminate()


@pytest.mark.slow
def test_waiting_runs_are_withdrawn_and_running_ones_stop(config, root, worker):
    run = queue.enqueue(replace(config, out=root / "a"))
    queue.withdraw(run)
    assert run.state() == "stopped"
    with pytest.raises(UserError, match="is not running"):
        queue.withdraw(run)
    queue.requeue(run)
    assert run.state() == "queued"
    with pytest.raises(UserError, match="is queued: only a run that was stopped"):
        queue.requeue(run)
    long = queue.enqueue(replace(config, steps=5000, out=root / "b"))
    worker()
    wait_for(lambda: long.state() == "running")
    queue.withdraw(long)
    wait_for(lambda: long.state() == "stopped")
    assert long.checkpoint_files()
    assert run.state() == "done"


@pytest.mark.slow
def test_fixed_compositions_wait_too(config, root, worker):
    one = train(replace(config, out=root.parent / "one"))
    both = (str(one.folder), str(one.folder))
    run = queue.enqueue(ComposeConfig(adapters=both, base=config.base, out=root / "both"))
    worker("0", "--until-empty").communicate(timeout=240)
    assert run.state() == "done"
    assert (run.adapter / "unet").is_dir()


def test_a_run_on_another_machine_is_judged_by_its_signs_of_life(config, root):
    run = queue.enqueue(replace(config, out=root / "a"))
    status = run.status() | {"state": "running", "host": "elsewhere", "pid": 1}
    write_text(run.status_file, json.dumps(status | {"beat": time.time()}))
    assert run.state() == "running"
    assert run.is_live()
    write_text(run.status_file, json.dumps(status | {"beat": time.time() - 1000}))
    assert run.state() == "lost"


def test_folders_with_rubbish_are_passed_over(config, root):
    queue.enqueue(replace(config, out=root / "a"))
    (root / "rubbish").mkdir()
    (root / "rubbish" / "status.json").write_text("{{{")
    (root / "broken").mkdir()
    (root / "broken" / "config.yaml").write_bytes(b"\x00\xff")
    (root / "broken" / "status.json").write_text("[1, 2]")
    (root / "file").write_text("x")
    assert {run.folder.name: run.state() for run in queue.list_runs(root)} == {"a": "queued", "broken": ""}
    assert [run.folder.name for run in queue.queued_runs(root)] == ["a"]


def test_a_config_is_queued_from_the_command_line(config, root, capsys):
    run = train(replace(config, steps=2, out=root.parent / "one"))
    main(["queue", str(run.config_file), "--out", str(root / "again")])
    assert "waits. Carry it out with: rankfold work" in capsys.readouterr().out
    assert Run(root / "again").state() == "queued"


def test_a_clock_that_was_set_right(root, config):
    """Where there are no locks: a second more or less is the same process, a minute another; a lock knows no clock."""
    run = queue.enqueue(replace(config, out=root / "a"))
    run.set_status(state="running")
    mine = run.status()
    write_text(run.status_file, json.dumps(mine | {"born": mine["born"] - 86400}))
    assert run.state() == "lost"
    run.lock()
    assert run.state() == "running"
    run.unlock()
    for seconds, alive in ((1.0, True), (-1.0, True), (60.0, False)):
        assert is_process_alive(mine | {"born": mine["born"] + seconds}) == alive
    for rubbish in (None, "yesterday"):
        assert not is_process_alive(mine | {"born": rubbish})
