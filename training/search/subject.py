"""Structure search for subject-driven generation: structures are judged by the denoising loss on held-out images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random

from accelerate import Accelerator
from torch import nn

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.data.subjects import Sample, find_samples
from ..config.search import SearchConfig
from ..config.subject import SubjectConfig
from ..subject.denoising import attach_to_parts
from ..subject.images import DiffusionTask
from .task import StructureSearch, supernet_config


class SearchTask(StructureSearch, DiffusionTask):
    """The Task of training the supernet, and the search behind it."""

    config: SearchConfig

    def __init__(
        self,
        config: SearchConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        judge: Callable[[DiffusionTask], float] | None = None,
    ) -> None:
        """judge: see `open_space`."""
        train, held_out = split_held_out(config, samples)
        super().__init__(config, train, base, accelerator, held_out)
        self.open_space(judge)
        self.judge_batches = self.held_out_batch(config.held_out_draws, seed=config.search_seed)

    def may_train_text(self) -> bool:
        return self.config.train_text_encoder

    def attach(self) -> dict[str, nn.Module]:
        """Puts the supernet on the model."""
        return attach_to_parts(self.model, self.config, lambda targets: supernet_config(self.config, targets))

    def held_out_loss(self) -> float:
        """Mean denoising loss, at noise and timesteps that are drawn once."""
        return float(self.losses_on(self.judge_batches).mean())

    def save_facts(self, folder: Path) -> None:
        write_text(folder / "rankfold.json", json.dumps(self.config.facts | {"adapter": "glora"}, indent=1))

    def retraining(self, run: Run, options: dict[str, str]) -> SubjectConfig:
        config = self.config
        shared = {k: v for k, v in asdict(config).items() if k in SubjectConfig.__dataclass_fields__}
        own = {"adapter": "glora", "alpha": float(config.rank), "adapter_options": options}
        return SubjectConfig(**(shared | own | {"out": run.folder / "retrained"}))


def split_held_out(config: SearchConfig, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Images to train on, and images to judge on.

    Raises:
        UserError: when there are too few to hold one out.
    """
    if config.held_out is not None:
        return samples, find_samples(config.held_out, flip=False, skip_bad=config.skip_bad)
    files = sorted({sample.path for sample in samples})
    if len(files) < 2:
        raise UserError(
            "--images holds one image, so none can be held out: add images, or give others with --held-out."
        )
    count = max(1, round(config.held_out_share * len(files)))
    out = set(Random(f"{config.search_seed}/held out").sample(files, min(count, len(files) - 1)))
    kept = [sample for sample in samples if sample.path not in out]
    return kept, [sample for sample in samples if sample.path in out and not sample.flip]
