"""Subject-driven training (DreamBooth): a new adapter on a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ...toolkit.adapters.attach import adapter_layers
from ...toolkit.core.errors import UserError
from ...toolkit.core.run_folder import Run
from ...toolkit.data.subjects import Sample
from ..config.subject import SubjectConfig
from ..engine.attaching import calibrate_adapters, drop_unused_layers
from ..engine.task import TrainingTask
from .adapter import SubjectAdapter
from .edit_measuring import EditMeasuring
from .held_out import held_out_samples, measured_pairs, measured_prompts, split_measured_photos
from .image_measuring import SubjectMeasuring
from .loss_measuring import LossMeasuring
from .preview_base import load_preview_base
from .step_measuring import StepMeasuring
from .training import ImageTraining, prepare_image_training
from .training_adapter import describe_adapter


class SubjectTask(TrainingTask[ImageTraining, SubjectAdapter]):
    """The Task of subject-driven training: measures while it trains, and keeps the best step, if so wished."""

    def __init__(
        self,
        config: SubjectConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        """held_out: images that are made ready and not trained on, see `ImageTraining.held_out_batch`."""
        held_out = held_out or held_out_samples(config, samples)
        samples, photos = split_measured_photos(config, samples)
        check_token_in_captions(config, samples)
        pairs, adapter = measured_pairs(config, held_out), SubjectAdapter(config)
        test = None if pairs else measured_prompts(config)
        texts = test.texts(token=True) if test else ()
        preview_base = load_preview_base(config, accelerator, texts) if config.preview_base else None
        training = prepare_image_training(
            config,
            samples,
            base,
            accelerator,
            adapter,
            held_out=held_out,
            texts=texts,
            shard_base=config.shard_base,
            blocks_to_swap=config.blocks_to_swap,
            training_adapter=config.training_adapter,
            preview_base=preview_base,
            target_guidance=config.target_guidance,
        )
        first = training.batch(0, list(range(config.batch_size)))  # the same on every process
        calibrate_adapters(training.module, training.parts, first)
        drop_unused_parts(training)
        if preview_base:
            preview_base.share_adapter(training.model.denoiser)
        super().__init__(training, adapter)
        self.config = config
        trained = [sample.path for sample in samples if not sample.flip]
        self.measuring: StepMeasuring | None = None
        if pairs:
            self.measuring = EditMeasuring(config, training, accelerator, self.save_adapter, pairs)
        elif test:
            self.measuring = SubjectMeasuring(
                config, training, accelerator, self.save_adapter, test=test, photos=photos, trained=trained
            )
        elif config.evaluate_every:
            self.measuring = LossMeasuring(config, training, accelerator, self.save_adapter)

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        return self.measuring is not None and self.measuring.after_step(run, step, with_average)

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """Keeps the best of the measured steps, if so wished."""
        if self.measuring and accelerator.is_main_process and self.config.keep == "best":
            self.measuring.keep_best(run)
        return "done"

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter, and what it was trained on."""
        self.trainable.save(folder)
        config = self.config
        merged = describe_adapter(config.training_adapter) if config.training_adapter else ""
        replace(config.facts, adapter=config.adapter, also=tuple(config.also), training_adapter=merged).save(folder)


def check_token_in_captions(config: SubjectConfig, samples: Sequence[Sample]) -> None:
    """Raises UserError when no image's caption has the token that shall be learned, so that its vectors never would be."""
    if config.num_vectors and not any(config.token in (sample.caption or config.prompt) for sample in samples):
        raise UserError(
            f"No caption says {config.token}, so --num-vectors would learn nothing: put it into the captions, or remove them."
        )


def drop_unused_parts(training: ImageTraining) -> None:
    """Takes the adapter off layers that have no part in the loss, and says which.

    Raises:
        UserError: when that is every layer of a part.
    """
    unused = drop_unused_layers(training.module, training.parts, training.batch(0, [0]))
    for name, layers in unused.items():
        if not layers:
            continue
        if not adapter_layers(training.parts[name]):
            raise UserError(f"None of the chosen layers of {name} has a part in the prediction: choose others.")
        print(f"{name}: {len(layers)} layers have no part in the prediction and carry no adapter, such as {layers[-1]}")
