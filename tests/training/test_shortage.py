"""Memory that runs out, for real: one sentence with what was being done and the next saving, and nothing written is lost."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
import torch
from settings import quick_config

from rankfold.apps.studio.render.messages import show_errors
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.out_of_memory import OutOfMemory, is_out_of_memory, oom_context
from rankfold.toolkit.core.run_folder import Run
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.launch.out_of_memory import advice, next_saving
from rankfold.training.launch.start import resume, train
from rankfold.training.subject.task import SubjectTask

MORE_THAN_THERE_IS = 2**45  # numbers; no machine's address space has room for them


class Greedy(SubjectTask):
    """Wants more memory than there is, from its third step on."""

    def batch(self, position, slots):
        if position >= 2 * self.config.batch_size:
            torch.empty(MORE_THAN_THERE_IS)
        return super().batch(position, slots)


class GreedyFromTheStart(SubjectTask):
    def __init__(self, *_):
        torch.empty(MORE_THAN_THERE_IS)


class GreedyPreviews(SubjectTask):
    def preview(self):
        return [torch.empty(MORE_THAN_THERE_IS)]


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), True),
        (RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("--base x is out of memory of men"), False),
    ],
)
def test_what_a_lack_of_memory_is(error, shortage):
    assert is_out_of_memory(error) == shortage
    wrapped = UserError("--clip x cannot be loaded (RuntimeError)")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == shortage


def test_what_was_being_done():
    with (
        pytest.raises(OutOfMemory) as told,
        oom_context("measuring", "Buy more."),
        oom_context("", lambda: "Take less."),
        oom_context("drawing 4 images"),
    ):
        torch.empty(MORE_THAN_THERE_IS)
    assert str(told.value) == "Memory ran out while drawing 4 images (measuring). Take less."
    assert isinstance(told.value.__cause__, RuntimeError)
    with pytest.raises(ZeroDivisionError), oom_context("dividing"):
        1 / 0  # noqa: B018
    with pytest.raises(OutOfMemory, match="Memory of the GPU ran out while adding"), oom_context("adding"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_what_frames_held_is_let_go():
    import weakref

    held = []

    def step():
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        torch.empty(MORE_THAN_THERE_IS)

    with pytest.raises(OutOfMemory), oom_context("adding"):
        step()
    assert held[0]() is None


def test_a_run_keeps_what_it_has(config):
    config = replace(config, steps=5, checkpoint_every=1)
    with pytest.raises(UserError) as told:
        train(config, Greedy)
    sentence = str(told.value)
    assert sentence == (
        "Memory ran out while training step 3. Start again with --precision bf16, the next saving of --fit. The last checkpoint, "
        f"000002.pt, is whole: 'rankfold resume {config.out}' goes on from it, given more memory."
    )
    run = Run(config.out)
    assert (run.status()["state"], run.status()["error"], run.status()["step"]) == ("failed", sentence, 2)
    assert "Traceback" in run.log_file.read_text(encoding="utf-8")
    assert "can't allocate memory" in run.log_file.read_text(encoding="utf-8")
    assert resume(config.out).status()["state"] == "done"


def test_a_preview_without_memory_is_passed_over(config, capsys):
    run = train(replace(config, steps=2, preview_every=1), GreedyPreviews)
    assert run.status()["state"] == "done"
    assert "The preview of step 1 failed, training goes on: Memory ran out while previewing." in capsys.readouterr().err


def test_before_the_first_step(config):
    with pytest.raises(OutOfMemory) as told:
        train(config, GreedyFromTheStart)
    assert "Memory ran out while preparing the run. Start again with --precision bf16" in str(told.value)
    assert "No checkpoint had been written yet." in str(told.value)


def test_the_next_saving():
    small = quick_config(SubjectConfig, batch_size=4, gradient_accumulation=2)
    found = []
    for change in (
        {},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"optimizer": "AdamW8bit"},
        {"batch_size": 1},
        {"quantize": "int8"},
        {"quantize": "nf4"},
    ):
        small = replace(small, **change)
        found.append(next_saving(small))
    assert found == [
        "--precision bf16",
        "--gradient-checkpointing",
        "--optimizer AdamW8bit",
        "--batch-size 1 --gradient-accumulation 8",
        "--quantize int8",
        "--quantize nf4",
        "",
    ]
    assert next_saving(quick_config(SubjectConfig, precision="fp16")) == "--gradient-checkpointing"
    assert "Lower --resolution" in advice(small, Run(Path("runs/x")))
    talking = quick_config(
        InstructConfig, **{name: getattr(small, name) for name in ("precision", "quantize", "optimizer", "batch_size")}
    )
    talking = replace(talking, gradient_checkpointing=True)
    assert "Lower --max-length" in advice(talking, Run(Path("runs/x")))
    assert "--workers 0" in advice(talking, Run(Path("runs/x")), reading=True)


def test_a_saving_that_does_not_work_here_is_no_advice(monkeypatch):
    from rankfold.toolkit.core import devices

    monkeypatch.setattr(devices, "this_machine", lambda: devices.Machine("cpu", has_kernel=lambda *_: False))
    small = quick_config(SubjectConfig, precision="bf16", gradient_checkpointing=True, batch_size=1)
    assert next_saving(small) == ""


def test_the_studio_says_it():
    with pytest.raises(gr.Error, match=r"Memory ran out while this was done\. Close other programs"):
        show_errors(lambda: torch.empty(MORE_THAN_THERE_IS))()


LIMITED = """
import json, sys, resource, psutil
from rankfold.apps.cli import main
import rankfold.training.launch.start, rankfold.pipelines.export
room, commands = json.loads(sys.argv[1])
for number, words in enumerate(commands):
    if number:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, resource.RLIM_INFINITY))
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("END", code, file=sys.stderr)
"""


def test_commands_in_little_memory(config, tmp_path):
    """A process that may have 300 MiB more than the libraries take: training works, large images and batches do not."""
    run = train(replace(config, steps=2, base="tiny"))
    common = [
        "--images",
        str(config.images),
        "--threads",
        "1",
        "--steps",
        "2",
        "--preview-every",
        "0",
        "--base",
        "tiny",
    ]
    commands = [
        ["train", "subject", *common, "--out", str(tmp_path / "a")],
        ["train", "subject", *common, "--out", str(tmp_path / "b"), "--batch-size", "20000"],
        ["sample", "--run", str(run.folder), "--width", "4096", "--steps", "1", "--out", str(tmp_path / "made")],
        ["sample", "--run", str(run.folder), "--n", "2", "--width", "4096", "--precision", "bf16", "--out", str(tmp_path / "made")],
        ["train", "subject", *common, "--out", str(tmp_path / "c")],
    ]  # fmt: skip
    words = [sys.executable, "-c", LIMITED, json.dumps([300 * 2**20, commands])]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    told = [part.strip().splitlines() for part in done.stderr.split("END")]
    last = [lines[-1] if lines else "" for lines in told]
    assert last[0].startswith("step 2/2")
    assert last[1].startswith("rankfold: Memory ran out while ")
    assert "Start again with --precision bf16" in last[1]
    assert last[2].startswith(
        "rankfold: Memory ran out while drawing 1 image of 4096 x 4096 pixels. Take --precision bf16"
    )
    assert last[3].startswith(
        "rankfold: Memory ran out while drawing 2 images of 4096 x 4096 pixels. Take fewer images"
    )
    assert last[4].startswith("step 2/2")  # what the others held has been let go
    assert [lines[0] for lines in told[1:]] == ["0", "2", "2", "2", "0"]
    assert Run(tmp_path / "b").status()["state"] == "failed"
