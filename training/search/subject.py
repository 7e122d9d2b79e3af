"""Structure search for subject-driven generation: structures are judged by the denoising loss on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from accelerate import Accelerator

from ...toolkit.core.errors import UserError
from ...toolkit.data.subjects import Sample, find_samples
from ..config.search import SearchConfig
from ..config.subject import SubjectConfig
from ..subject.adapter import attach_to_parts
from ..subject.training import ImageTraining, prepare_image_training
from .supernet import Supernet
from .task import SupernetTask


class SearchTask(SupernetTask[ImageTraining]):
    """The Task of training the supernet, with another path in every step, and the search behind it."""

    retrained_config = SubjectConfig

    def __init__(
        self,
        config: SearchConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        judge: Callable[[SearchTask], float] | None = None,
    ) -> None:
        """judge: fitness of the task's model as it stands, higher is better; None is by the held-out loss."""
        train, held_out = split_held_out(config, samples)
        supernet = Supernet(config, attach_to_parts)
        training = prepare_image_training(config, train, base, accelerator, supernet, held_out=held_out)
        super().__init__(config, training, supernet, judge)
        self.judge_batches = training.held_out_batch(config.held_out_draws, seed=config.search_seed)

    def held_out_loss(self) -> float:
        """Mean denoising loss, at noise and timesteps that are drawn once."""
        return float(self.training.losses_on(self.judge_batches).mean())

    def save_facts(self, folder: Path) -> None:
        """Writes what the winner's folder tells of itself."""
        replace(self.config.facts, adapter="glora").save(folder)


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
