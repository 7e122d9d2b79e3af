"""Composition for diffusion models: weights learned on a few images."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from ...toolkit.data.subjects import Sample
from ..config.compose import ComposeConfig
from ..engine.task import TrainingTask
from ..subject.training import ImageTraining, prepare_image_training
from .mixture import AdapterMixture


class ComposeTask(TrainingTask[ImageTraining, AdapterMixture]):
    """The Task of learning the weights on a few images; all else is frozen."""

    def __init__(
        self,
        config: ComposeConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        """held_out: images that are made ready and not trained on, see `ImageTraining.held_out_batch`."""
        mixture = AdapterMixture(config, config.facts)
        super().__init__(
            prepare_image_training(config, samples, base, accelerator, mixture, held_out=held_out), mixture
        )
