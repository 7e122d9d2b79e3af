"""Runs that are stopped and compared."""

import torch
from safetensors.torch import load_file
from settings import quick_config

from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.yaml_file import to_yaml
from rankfold.training.launch.start import train


def adapter(folder, part="unet"):
    return load_file(folder / "adapter" / part / "adapter_model.safetensors")


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write_config(config, path):
    path.write_text(to_yaml(config))
    return path


def train_until(config, step):
    """Trains and asks for a stop through the run folder once `step` is done."""
    from rankfold.training.engine import loop

    original, pause = loop.Loop.train_step, loop.REQUEST_SECONDS

    def one_step(self):
        original(self)
        if self.step == step:
            (self.run.requests / "stop").touch()

    loop.Loop.train_step, loop.REQUEST_SECONDS = one_step, 0.0
    try:
        return train(config)
    finally:
        loop.Loop.train_step, loop.REQUEST_SECONDS = original, pause


def compose_config(base, runs, out, **changes):
    common = {"steps": 6, "batch_size": 2, "log_every": 2, "checkpoint_every": 2, "preview_every": 0, "threads": 1}
    adapters = tuple(str(run.folder) for run in runs)
    own = {"base": str(base), "adapters": adapters, "out": out}
    return quick_config(ComposeConfig, **own, **(common | changes))
