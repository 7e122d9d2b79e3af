"""The loop on a real pipeline: exact resume, clean stops, faults, caches, precision, two processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from accelerate import Accelerator, DistributedType
from forked import free_port, in_two_processes, run_in_two_processes
from shares import write_work
from short_runs import adapter, equal_states, train_until, write_config

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.engine.processes import share_work
from rankfold.training.launch.start import preflight, resume, train

TRAIN = [sys.executable, "-m", "rankfold.apps.cli"]
DEVICES = Path(__file__).parents[2] / "assets" / "devices"


def test_run_folder(config):
    run = train(replace(config, preview_every=3, preview_steps=2))
    assert run.status()["state"] == "done"
    assert [row["step"] for row in run.metrics()] == [2, 4, 6]
    assert len(list(run.samples.glob("*.png"))) == 4
    assert [p.name for p in run.checkpoint_files()] == ["000004.pt", "000006.pt"]
    assert json.loads((run.adapter / "rankfold.json").read_text(encoding="utf-8"))["token"] == "sks"


def test_the_written_config_repeats_the_run(config, tmp_path):
    from rankfold.training.config.yaml_file import from_yaml

    first = train(config)
    again = train(replace(from_yaml(first.config_file), out=tmp_path / "again"))
    assert equal_states(adapter(first.folder), adapter(again.folder))
    other = train(replace(config, seed=1, out=tmp_path / "other"))
    assert not equal_states(adapter(first.folder), adapter(other.folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "lora"},
        {"train_text_encoder": True, "dropout": 0.1, "gradient_accumulation": 2},
        {"ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "optimizer": "RAdam"},
        {"prior_weight": 1.0, "prior_images": 3, "preview_steps": 2, "min_snr_gamma": 5.0},
        {"precision": "bf16", "gradient_checkpointing": True, "flip": True},
    ],
)
def test_resume_is_exact(config, tmp_path, changes):
    """Stopping after step 3, between two checkpoints and two log lines, changes no bit of the outcome."""
    config = replace(config, **changes)
    whole = train(replace(config, out=tmp_path / "whole"))
    part = train_until(replace(config, out=tmp_path / "part"), 3)
    assert part.status()["state"] == "stopped"
    assert part.status()["step"] == 3
    resume(part.folder)
    for name in ("unet", "text_encoder") if config.train_text_encoder else ("unet",):
        assert equal_states(adapter(whole.folder, name), adapter(part.folder, name))
    losses = [{row["step"]: row["loss"] for row in run.metrics()} for run in (whole, part)]
    assert all(losses[1][step] == pytest.approx(loss, rel=1e-6) for step, loss in losses[0].items() if step != 4)


def test_a_failing_preview_is_said_and_changes_nothing(config, tmp_path, capsys):
    """A preview that cannot be written, since a file lies where its folder was, costs neither the run nor its checkpoints."""
    from rankfold.training.engine import loop

    whole = train(replace(config, out=tmp_path / "whole"))
    original = loop.Loop.preview

    def preview(self):
        if self.run.samples.is_dir():
            self.run.samples.rmdir()
            self.run.samples.touch()
        original(self)

    loop.Loop.preview = preview
    try:
        run = train(replace(config, out=tmp_path / "run", preview_every=2, preview_steps=1))
    finally:
        loop.Loop.preview = original
    assert run.status()["state"] == "done"
    assert len(run.checkpoint_files()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"The preview of step {step} failed, training goes on: Could not write" in said for step in (2, 4, 6))
    assert "Traceback" in run.log_file.read_text()
    assert equal_states(adapter(whole.folder), adapter(run.folder))


def test_the_checkpoint_of_a_step_is_there_before_its_preview(config):
    from rankfold.training.engine import loop

    original, seen = loop.Loop.preview, []
    loop.Loop.preview = lambda self: seen.append(self.latest_name())
    try:
        train(replace(config, preview_every=2))
    finally:
        loop.Loop.preview = original
    assert seen == ["000002.pt", "000004.pt", "000006.pt"]


def test_measuring_that_fails_loses_no_step(config, tmp_path):
    """The run ends, since its outcome hangs on what is measured, but goes on from the very step."""
    from rankfold.training.engine import loop

    (tmp_path / "prompts.txt").write_text("a {token} {noun}\n")
    config = replace(
        config, checkpoint_every=100, evaluate_every=3, evaluate_prompts=str(tmp_path / "prompts.txt"), evaluate_clip="embedded",
        preview_steps=1,
    )  # fmt: skip
    snapshot, original = config.out / "measured" / "000003", loop.Loop.check_finished

    def enough(self):
        if self.step == 3:
            snapshot.touch()  # a file where a folder is to be
        return original(self)

    loop.Loop.check_finished = enough
    try:
        with pytest.raises(UserError, match="Could not write"):
            train(config)
    finally:
        loop.Loop.check_finished = original
    assert [file.name for file in Run(config.out).checkpoint_files()] == ["000003.pt"]
    snapshot.unlink()
    assert resume(config.out).status()["state"] == "done"


@pytest.mark.slow
def test_kill_at_any_moment(config, tmp_path, cache):
    """kill -9 at random moments, with a checkpoint written every step so that some kills hit one half written."""
    config = replace(config, steps=40, checkpoint_every=1, out=tmp_path / "whole")
    whole = train(config)
    run = Run(tmp_path / "killed")
    file = write_config(replace(config, out=run.folder), tmp_path / "run.yaml")
    draw, command, kills = random.Random(0), ["train", "subject", "--config", str(file)], 0
    for _ in range(12):
        process, before = forked.start_process(forked.commands(command), tmp_path / "said.txt"), len(run.metrics())
        while process.is_alive() and len(run.metrics()) <= before:
            time.sleep(0.005)
        if kills < 4:
            time.sleep(draw.uniform(0, 0.25))
            kills += process.is_alive()
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        command = ["resume", str(run.folder)]
    assert kills >= 3
    assert run.status()["state"] == "done"
    assert equal_states(adapter(whole.folder), adapter(run.folder))
    steps = [row["step"] for row in run.metrics()]
    assert steps == sorted(set(steps))
    assert not list(run.folder.rglob(".*.tmp"))


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_cleanly(config, tmp_path, monkeypatch):
    config = replace(config, steps=5000, checkpoint_every=5000)
    file = write_config(config, tmp_path / "run.yaml")
    process = subprocess.Popen(
        [*TRAIN, "train", "subject", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    run = Run(config.out)
    while process.poll() is None and not run.metrics():
        time.sleep(0.05)
    with pytest.raises(UserError, match="in use by a live run"):
        train(config)
    monkeypatch.setenv("RANK", "1")  # the second process of a run may come when the first has begun
    preflight(config)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "rankfold resume" in out
    assert run.status()["state"] == "stopped"
    assert len(run.checkpoint_files()) == 1


def launch_on_two_machines(command, folder):
    """A command as docs/devices.md starts it, one process a machine; both machines are this one."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        DEVICES / "two-machines.yaml",
    ]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    environment, files = os.environ | {"ACCELERATE_USE_CPU": "true"}, [folder / f"machine{rank}.txt" for rank in "01"]
    started = []
    for rank, file in zip("01", files, strict=True):
        words = [*launch, "--machine_rank", rank, "-m", "rankfold.apps.cli", *command]
        with file.open("w") as said:
            started.append(subprocess.Popen(words, stdout=said, stderr=said, env=environment))
    assert [process.wait() for process in started] == [0, 0], "".join(
        file.read_text(encoding="utf-8")[-6000:] for file in files
    )


def test_configs_for_several_devices_are_what_accelerate_reads():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for name, count, machines in (("one-machine", 4, 1), ("two-machines", 16, 2)):
        words = ["--config_file", str(DEVICES / f"{name}.yaml"), "-m", "rankfold.apps.cli", "train"]
        read, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (read.multi_gpu, read.num_processes, read.num_machines) == (True, count, machines)


@pytest.mark.slow
def test_two_processes_give_the_same_curve(config, tmp_path):
    config = replace(config, batch_size=4, log_every=1, checkpoint_every=6)
    one = train(replace(config, out=tmp_path / "one"))
    file = write_config(replace(config, out=tmp_path / "two"), tmp_path / "run.yaml")
    launch_on_two_machines(["train", "subject", "--config", str(file)], tmp_path)
    two = Run(tmp_path / "two")
    assert two.status()["processes"] == 2
    for a, b in zip(one.metrics(), two.metrics(), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for a, b in zip(adapter(one.folder).values(), adapter(two.folder).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_two_processes_share_what_is_cached(config, tmp_path, monkeypatch):
    """Latents, words and class images made in shares, from an empty cache, give the curve of one process."""
    more = {"batch_size": 4, "log_every": 1, "prior_weight": 1.0, "prior_images": 3, "preview_steps": 2}
    config = replace(config, **more)
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "first"))
    one = train(replace(config, out=tmp_path / "one"))
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "second"))
    file = write_config(replace(config, out=tmp_path / "two"), tmp_path / "run.yaml")
    run_in_two_processes(tmp_path, ["train", "subject", "--config", str(file)])
    # Class images made in other batches are rounded in another way, so the latents' hashes are others.
    files = [sorted(p.suffix for p in (tmp_path / cache).rglob("*.*")) for cache in ("first", "second")]
    assert files[0] == files[1]
    assert files[0].count(".png") == 3
    for a, b in zip(one.metrics(), Run(tmp_path / "two").metrics(), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def test_a_process_makes_its_share_first():
    order = []
    makers = [lambda n=n: order.append(n) or n for n in range(5)]
    second = SimpleNamespace(process_index=1, num_processes=2, wait_for_everyone=lambda: order.append("wait"))
    assert share_work(second, makers) == [0, 1, 2, 3, 4]
    assert order == [1, 3, "wait", 0, 2, 4]


def test_work_is_shared_out(tmp_path):
    """In order, all have all of it, and both work equally often."""
    in_two_processes(partial(write_work, tmp_path / "work"), tmp_path)
    facts = [json.loads((tmp_path / f"work{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    assert [own["worked"] for own in facts] == [[0, 2, 4], [1, 3, 0]]
    for own in facts:
        assert own["made"] == [0, 10, 20, 30, 40]
        assert own["none"] == []
        assert own["first"] == 0


def test_sharding_is_refused(config, monkeypatch):
    """accelerate itself shards on accelerators only, so the answer of its state is given here."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(UserError, match=r"launch with --multi_gpu .* --shard-base"):
        train(config)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(UserError, match=r"not finite.*000002\.pt"):
        train_with_fault(config, step=3)
    run = Run(config.out)
    assert run.status()["state"] == "failed"
    assert "not finite" in run.log_file.read_text(encoding="utf-8")
    assert [row["step"] for row in run.metrics()] == [2]
    assert [p.name for p in run.checkpoint_files()] == ["000002.pt"]


def train_with_fault(config, step):
    """Trains with the weights spoiled at `step`, as an overflow would."""
    from rankfold.training.engine import loop

    original = loop.Loop.train_step

    def one_step(self):
        if self.step == step:
            self.parameters[0].data.fill_(float("nan"))
            self.parameters[-1].data.fill_(float("nan"))
        original(self)

    loop.Loop.train_step = one_step
    try:
        return train(config)
    finally:
        loop.Loop.train_step = original


def test_a_dead_adapter_stops_the_run(config):
    with pytest.raises(UserError, match="still has no effect"):
        train(replace(config, steps=30, learning_rate=1e-60, weight_decay=0.0, checkpoint_every=10))
    assert [p.name for p in Run(config.out).checkpoint_files()] == ["000010.pt"]


def test_full_disk_keeps_the_previous_checkpoint(config, tmp_path):
    """The system refuses to write files as large as a checkpoint from step 3 on, as a full disk would."""
    file = write_config(config, tmp_path / "run.yaml")
    code = f"""
import resource
from pathlib import Path
from rankfold.training.engine import loop
from rankfold.apps.cli import main
original = loop.Loop.train_step
def one_step(self):
    original(self)
    if self.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
loop.Loop.train_step = one_step
main(["train", "subject", "--config", {str(file)!r}])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Could not write" in result.stderr
    assert "000004.pt" in result.stderr.splitlines()[-1]
    run = Run(config.out)
    assert run.status()["state"] == "failed"
    assert [p.name for p in run.checkpoint_files()] == ["000002.pt"]
    assert not list(run.folder.rglob(".*.tmp"))
    assert resume(run.folder).status()["state"] == "done"


def test_checkpoint_of_another_config_is_refused(config):
    run = train(config)
    run.config_file.write_text(run.config_file.read_text(encoding="utf-8").replace("rank: 4", "rank: 2"))
    with pytest.raises(UserError, match="rank was 4, now it is 2"):
        resume(run.folder)


def test_caches_follow_the_image(config, images, tmp_path, cache, monkeypatch):
    """A second run encodes nothing; a changed image is re-encoded."""
    import shutil

    from rankfold.toolkit.diffusion.model import DiffusionModel

    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    train(replace(config, images=copy))
    encoded = []
    original = DiffusionModel.encode_image
    monkeypatch.setattr(DiffusionModel, "encode_image", lambda self, image: encoded.append(1) or original(self, image))
    train(replace(config, images=copy, out=tmp_path / "b"))
    assert not encoded
    shutil.copy(copy / "1.png", copy / "0.png")
    from PIL import Image

    Image.open(copy / "1.png").rotate(90).save(copy / "1.png")
    train(replace(config, images=copy, out=tmp_path / "c"))
    assert len(encoded) == 1


def test_encoders_leave_memory(config):
    from rankfold.toolkit.data.subjects import find_samples
    from rankfold.training.engine.processes import make_accelerator
    from rankfold.training.subject.task import SubjectTask

    task = SubjectTask(config, find_samples(config.images), config.base, make_accelerator(config))
    assert not {"vae", "text_encoder"} & set(task.training.model.loaded)
    assert task.training.model.text_pipe is None


def test_encoders_are_gone_before_the_denoiser_comes(config, tmp_path, monkeypatch):
    from rankfold.toolkit.diffusion.model import DiffusionModel

    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "empty"))
    beside, original = {}, DiffusionModel.load
    monkeypatch.setattr(
        DiffusionModel,
        "load",
        lambda self, name: (beside.setdefault(name, set(self.loaded)) and None) or original(self, name),
    )
    train(replace(config, train_text_encoder=False, steps=1, preview_every=0))
    assert {"vae", "text_encoder"} <= set(beside)
    assert not {"vae", "text_encoder"} & beside["unet"]


def test_tensorboard(config):
    train(replace(config, tracker="tensorboard"))
    assert list(config.out.rglob("events.out.tfevents*"))
