"""What a method supplies to the loop: a Task, put together from a training (model and data) and a trainable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ...toolkit.core.run_folder import Run


class Task(Protocol):
    """What a training method supplies."""

    module: nn.Module
    """forward(batch) -> loss of each sample, (B,)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trainable parameters for the optimizer, with their learning rates."""
        ...

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """The rows `slots` of the forward pass that begins at sample number `position`."""
        ...

    def preview(self) -> Sequence[Image.Image | str]:
        """Images, or texts in JSON, that show what has been learned so far; asked of all processes, written by the first."""
        ...

    def is_dead(self) -> bool:
        """True when the adapter changes nothing."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter."""
        ...

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """What the method does after a step, in every process; True from any of them ends the training.

        with_average: runs an action with the averaged weights in place.
        """
        ...

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """What comes after the last step; returns 'done' or 'stopped'."""
        ...


class Trainable(Protocol):
    """What is put on a loaded model and trained: an adapter, a mixture of adapters, a supernet."""

    def attach(self, model: Any) -> dict[str, nn.Module]:
        """Puts it on a loaded model (DiffusionModel or VisionLanguageModel), once; returns the parts that it changes, by name."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trainable parameters for the optimizer, with their learning rates."""
        ...

    def is_dead(self) -> bool:
        """True when it changes nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Writes its weights as an adapter's folder."""
        ...


class Training(Protocol):
    """A loaded model with its data: the loss, batches for it, and previews."""

    @property
    def module(self) -> nn.Module:
        """forward(batch) -> loss of each sample, (B,)."""
        ...

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """The rows `slots` of the forward pass that begins at sample number `position`."""
        ...

    def preview(self) -> Sequence[Image.Image | str]:
        """What the model makes now."""
        ...


TrainingT = TypeVar("TrainingT", bound=Training)
TrainableT = TypeVar("TrainableT", bound=Trainable)


class TrainingTask(Generic[TrainingT, TrainableT]):
    """The Task of a training and its trainable. A method adds what it does beside: measuring, searching, what it saves."""

    def __init__(self, training: TrainingT, trainable: TrainableT) -> None:
        """training: prepared, with `trainable` on its model."""
        self.training, self.trainable = training, trainable
        self.module = training.module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the trainable."""
        return self.trainable.parameter_groups()

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows of the training's data."""
        return self.training.batch(position, slots)

    def preview(self) -> Sequence[Image.Image | str]:
        """What the model makes now."""
        return self.training.preview()

    def is_dead(self) -> bool:
        """True when the trainable changes nothing."""
        return self.trainable.is_dead()

    def save_adapter(self, folder: Path) -> None:
        """Writes the trainable's weights."""
        self.trainable.save(folder)

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Nothing; the training goes on."""
        return False

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """Nothing."""
        return "done"
