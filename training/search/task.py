"""What the searches on images and on conversations share: random paths while the supernet trains, then the search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from ...toolkit.core.run_folder import Run
from ..config.base import LoopConfig
from ..engine.task import TrainingT, TrainingTask
from .evolution import Structure
from .paths import SupernetPaths
from .search import StructureSearch
from .supernet import Supernet


class SupernetTask(TrainingTask[TrainingT, Supernet]):
    """The Task of training the supernet, with another path in every step, and the search behind it."""

    retrained_config: ClassVar[type[LoopConfig]]
    """The config that trains the winner from the start."""

    def __init__(
        self, config: Any, training: TrainingT, supernet: Supernet, judge: Callable[[Any], float] | None = None
    ) -> None:
        """judge: fitness of the task's model as it stands, higher is better; None is by the held-out loss."""
        super().__init__(training, supernet)
        self.config, self.judge = config, judge
        self.paths = SupernetPaths(config, training.parts)

    def held_out_loss(self) -> float:
        """Loss on what was held out, in eval mode."""
        raise NotImplementedError

    def save_facts(self, folder: Path) -> None:
        """Writes what the winner's folder tells of itself."""
        raise NotImplementedError

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """The rows of a forward pass; the path of its optimizer step is put to work."""
        self.paths.set_path_at(position)
        return self.training.batch(position, slots)

    def fitness(self, structure: Structure) -> float:
        """What the judge says, or minus the loss on what was held out."""
        self.paths.set_path(self.paths.path_of(structure))
        return self.judge(self) if self.judge else -self.held_out_loss()

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """The search."""
        self.module.eval()
        measure = "minus the judge's fitness" if self.judge else "held-out loss"
        search = StructureSearch(self.paths, self.training.parts, self.fitness, measure, run, accelerator)
        return search.conclude(self.save_facts, self.retraining)

    def retraining(self, run: Run, options: dict[str, str]) -> LoopConfig:
        """A config that trains the winner from the start, on the same data; options: of the adapter."""
        known = self.retrained_config.__dataclass_fields__
        shared = {key: value for key, value in asdict(self.config).items() if key in known}
        own = {"adapter": "glora", "alpha": float(self.config.rank), "adapter_options": options}
        return self.retrained_config(**(shared | own | {"out": run.folder / "retrained"}))
