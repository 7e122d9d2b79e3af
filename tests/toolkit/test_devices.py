"""Which device is chosen and what is known not to work on each; torch itself stands in for the devices that are not here."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankfold.apps.cli import main
from rankfold.pipelines.generate import Recipe, check_recipe
from rankfold.toolkit.core import devices
from rankfold.toolkit.core.devices import Machine
from rankfold.toolkit.core.errors import UserError
from rankfold.training.engine.optimizer import make_optimizer
from rankfold.training.launch.start import METHODS, preflight

# What has kernels where, as torch and bitsandbytes have them at the time of writing.
LACKING = {
    ("mps", "bitsandbytes::optimizer_update_8bit_blockwise"),
    ("mps", "aten::_fused_adagrad_"),
    ("xpu", "aten::_fused_adagrad_"),
}


def machine(kind, macos=(), system="Linux"):
    return Machine(kind, system, macos, lambda operation, kind: (kind, operation) not in LACKING)


CPU, CUDA, XPU = (machine(kind) for kind in ("cpu", "cuda", "xpu"))
OLD_MAC, MAC = (machine("mps", version, "Darwin") for version in ((13, 6), (15, 1)))


@pytest.mark.parametrize(
    ("where", "lines"),
    [
        (CUDA, []),
        (XPU, ["--attention flash_attention_2"]),
        (CPU, ["training with --precision fp16", "--attention flash_attention_2"]),
        (MAC, ["--optimizer AdamW8bit", "--optimizer Lion8bit", "--quantize fp8", "--attention flash_attention_2"]),
        (
            OLD_MAC,
            ["training with --precision bf16", "--optimizer AdamW8bit", "--optimizer Lion8bit", "--quantize fp8",
             "--attention flash_attention_2"],
        ),
    ],
)  # fmt: skip
def test_what_will_not_work(where, lines):
    told = devices.list_faults(where, lambda library: True)
    assert [line.partition(" needs")[0] for line in told] == lines
    assert all(line.endswith(".") and (";" in line or ":" in line) for line in told)  # each with its cure
    optional = devices.list_faults(where, lambda library: False)
    assert not any("8bit" in line or "fp8" in line for line in optional)


def test_fp16_for_sampling_alone():
    assert devices.precision_fault(CPU, "fp16", training=True)
    assert not devices.precision_fault(CPU, "fp16", training=False)
    assert devices.precision_fault(OLD_MAC, "bf16", training=False)


@pytest.mark.parametrize(
    ("where", "optimizer", "fused"),
    [
        (CUDA, "AdamW", True),
        (MAC, "AdamW", True),
        (MAC, "Adagrad", False),
        (XPU, "SGD", True),
        (CUDA, "RMSprop", False),
    ],
)
def test_fused(where, optimizer, fused):
    assert devices.has_fused_kernel(where, optimizer) == fused


@pytest.mark.parametrize(
    ("where", "nccl", "word"),
    [(CUDA, True, ""), (replace(CUDA, system="Windows"), False, "NCCL"), (MAC, False, "one device"), (CPU, False, "")],
)
def test_several_processes(where, nccl, word):
    fault = devices.distributed_fault(where, nccl=nccl)
    assert (word in fault) if word else not fault


def test_kernels_are_asked_of_torch():
    """On this machine, whatever it is, an operation that is said to be there runs."""
    assert devices.has_kernel("aten::_fused_adamw_", "cpu")
    assert not devices.has_kernel("aten::no_such_operation", "cpu")
    assert not devices.has_kernel("no_such_library::operation", "cpu")
    assert devices.has_kernel("bitsandbytes::optimizer_update_8bit_blockwise", "cpu")
    for quantize in devices.QUANTIZE_KERNELS:
        assert not devices.quantize_fault(Machine("cpu"), quantize)


@pytest.mark.parametrize(
    ("where", "words", "said"),
    [
        (OLD_MAC, ["--precision", "bf16"], "--precision bf16 needs macOS 14"),
        (MAC, ["--quantize", "fp8"], "--quantize fp8 needs 8 bit floating point, which mps lacks"),
        (MAC, ["--optimizer", "AdamW8bit"], "bitsandbytes lacks on mps; use AdamW"),
        (CPU, ["--precision", "fp16"], "--precision fp16 needs a GPU; use bf16 or fp32."),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(where, words, said, monkeypatch, images, tmp_path, capsys):
    monkeypatch.setattr(devices, "this_machine", lambda: where)
    with pytest.raises(SystemExit):
        main(["train", "subject", "--images", str(images), "--out", str(tmp_path / "run"), *words])
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_images_are_refused_too(monkeypatch):
    monkeypatch.setattr(devices, "this_machine", lambda: OLD_MAC)
    with pytest.raises(UserError, match="macOS 14"):
        check_recipe(Recipe(prompt="x", precision="bf16"))


def test_an_optimizer_without_one_kernel(config, monkeypatch):
    """Where torch has no fused step the optimizer is made without, and gives the same weights."""
    ends = []
    for where in (CPU, Machine("cpu", has_kernel=lambda *_: False)):
        monkeypatch.setattr(devices, "this_machine", lambda where=where: where)
        weight = torch.nn.Parameter(torch.arange(4.0))
        optimizer = make_optimizer(config, [{"params": [weight]}])
        assert bool(optimizer.defaults.get("fused")) == where.has_kernel("", "")
        for _ in range(3):
            weight.grad = torch.sin(weight.detach())
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


# ---------------------------------------------------------------------------------------------- chosen in one place


def test_the_device_is_accelerates(monkeypatch):
    assert devices.device() == PartialState().device
    assert devices.device_type() == PartialState().device.type
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: torch.device("mps")))
    assert devices.device_type() == "mps"
    assert devices.this_machine().kind == "mps"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.device_type() == "cpu"
    assert not PartialState._shared_state  # nothing was started to find out


def test_a_device_by_name():
    assert devices.parse_device("") == devices.device()
    assert devices.parse_device("cpu") == torch.device("cpu")
    for name in ("mps", "xpu", "gpu"):
        if not (hasattr(torch, name) and getattr(torch, name).is_available()):
            with pytest.raises(UserError, match=f"--device {name} is not available here: leave it out for"):
                devices.parse_device(name)


def test_seeds():
    drawn = []
    for _ in range(2):
        devices.seed_generators(devices.device(), 7)
        drawn.append((torch.rand(3), torch.rand(3, device=devices.device()).cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_memory():
    assert devices.peak_memory() > 2**20
    assert devices.free_memory(torch.device("cpu")) is None
    assert devices.free_memory(torch.device("mps")) is None  # it shares the main memory
    devices.release_memory()
    assert devices.describe_devices()


# ---------------------------------------------------------------------------------------------- without float64


class NoDouble(TorchDispatchMode):
    """Refuses float64, as a device that has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(made)):
            raise TypeError(f"{func} makes a tensor in float64, which this device has not")
        return made


def test_double_precision_is_the_cpus_business():
    assert devices.to_float64(torch.ones(2)).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="meta"):  # to the CPU it goes, where a tensor without numbers cannot
        devices.to_float64(torch.ones(2, device="meta"))
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("base", ["tiny", "tiny-dit"])
@pytest.mark.parametrize("adapter", ["moslora", "glora", "fvae", "loratrf"])
def test_a_step_without_double_precision(config, base, adapter):
    """Forward and backward pass and the optimizer's step stay on the device, so none of them may want float64."""
    config = replace(config, base=base, adapter=adapter, min_snr_gamma=None if base == "tiny-dit" else 5.0)
    config, inputs = preflight(config)
    AcceleratorState._reset_state()
    task = METHODS[type(config)][1](config, *inputs, Accelerator())
    optimizer = make_optimizer(config, task.parameter_groups())
    batch = task.batch(0, [0, 1])
    with NoDouble():
        task.module(batch).mean().backward()
        optimizer.step()


def test_threads_are_those_that_find_a_free_core():
    cores = os.cpu_count()
    assert devices.num_free_threads(0.1, max_threads=64) == cores
    assert devices.num_free_threads(1.0, max_threads=64) == max(1, cores - 1)
    assert devices.num_free_threads(100.0, max_threads=64) == 1
    assert devices.num_free_threads(0.0, max_threads=1) == 1


def test_a_busy_core_is_seen():
    before = devices.num_busy_cores(0.2)
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        busy = devices.num_busy_cores(0.5)
    finally:
        load.kill()
    assert before >= 0
    assert busy > 0.3  # a core of its own, or a share of one where the tests keep all busy


def test_a_taken_core_is_noticed(monkeypatch):
    from rankfold.training.engine.cpu_threads import SLOW_FACTOR, SLOW_STEPS, ThreadController

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(devices, "num_busy_cores", lambda: 1.0)
    monkeypatch.setattr(devices, "num_free_threads", lambda others: 3)
    pace = ThreadController()
    assert [pace.update(0.1) for _ in range(10)] == [0] * 10
    assert pace.update(5.0) == 0  # one slow step is nothing
    assert pace.update(0.1) == 0
    assert [pace.update(2.0) for _ in range(SLOW_STEPS)] == [0] * (SLOW_STEPS - 1) + [3]
    monkeypatch.setattr(devices, "num_free_threads", lambda others: 4)  # slow for another reason
    assert [pace.update(2.0) for _ in range(SLOW_STEPS)] == [0] * SLOW_STEPS
    assert pace.limit == 2 * SLOW_FACTOR
