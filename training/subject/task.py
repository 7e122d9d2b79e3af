"""Subject-driven training (DreamBooth): a new adapter on a frozen model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from torch import nn

from ...toolkit.adapters.attach import (
    adapter_layers,
    calibrate,
    disable_adapters,
    parameter_groups,
    remove_unused_adapters,
)
from ...toolkit.adapters.fold import is_dead
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.data.images import load_rgb
from ...toolkit.data.subjects import Sample, find_samples
from ...toolkit.diffusion.load import EMBEDDED
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.diffusion.textual_inversion import TextualInversionEmbedding, add_learned_token, save_token_embeddings
from ...toolkit.formats import native
from ...toolkit.metrics.clip import ClipScorer
from ..config.peft_config import peft_config
from ..config.subject import SubjectConfig
from ..engine.processes import broadcast_first
from ..engine.sharding import gathered_units
from ..evaluation import measuring
from ..evaluation.measuring import ValidationScorer
from ..evaluation.subject import SubjectTest, read_prompts
from .denoising import attach_to_parts
from .images import DiffusionTask

MIN_PHOTOS = 4  # of which one can be held out


def attach_subject(
    model: DiffusionModel, config: SubjectConfig
) -> tuple[dict[str, nn.Module], dict[str, TextualInversionEmbedding]]:
    """Puts the adapter on a model, and the token into its text encoders when it is to be a word of its own.

    Returns the parts that are trained, and the words by text encoder.
    """
    words = (
        add_learned_token(model, config.token, config.token_vectors, config.class_noun) if config.token_vectors else {}
    )
    parts = attach_to_parts(model, config, lambda targets: peft_config(config, targets))
    for word in words.values():
        word.vectors.requires_grad_(True)  # attaching has frozen all else
    return parts | {name: getattr(model, name) for name in words}, words


def split_measured_photos(config: SubjectConfig, samples: list[Sample]) -> tuple[list[Sample], list[Path]]:
    """The samples to train on, and the photos that likeness is measured by.

    Raises:
        UserError: when there are too few to hold one out, or one that shall be held out is not there.
    """
    if not config.evaluate_every:
        return samples, []
    if config.evaluate_images is not None:
        found = find_samples(config.evaluate_images, skip_bad=config.skip_bad, option="--evaluate-images")
        return samples, [sample.path for sample in found]
    files = sorted({sample.path for sample in samples})
    if config.hold_out:
        named = [path for path in files if path.name in config.hold_out]
        if len(named) != len(set(config.hold_out)) or len(named) == len(files):
            raise UserError(
                f"--hold-out {' '.join(config.hold_out)} must name photos of --images, and leave some to train on."
            )
        return [sample for sample in samples if sample.path not in named], named
    if len(files) < MIN_PHOTOS:
        raise UserError(
            f"--images holds {len(files)} photos, too few to hold one out for --evaluate-every: add photos up to {MIN_PHOTOS}, or give "
            "others with --evaluate-images."
        )
    out = set(Random(f"{config.seed}/measured by").sample(files, max(1, len(files) // 5)))
    return [sample for sample in samples if sample.path not in out], sorted(out)


class SubjectTask(DiffusionTask):
    """The Task of subject-driven training."""

    config: SubjectConfig

    def __init__(
        self,
        config: SubjectConfig,
        samples: list[Sample],
        base: str,
        accelerator: Accelerator,
        held_out: Sequence[Sample] = (),
    ) -> None:
        samples, self.measured_photos = split_measured_photos(config, samples)
        self.shards_base = config.shard_base
        super().__init__(config, samples, base, accelerator, held_out)
        self.measuring_started = False
        self.trained_photos = [sample.path for sample in samples if not sample.flip]
        first = self.batch(0, list(range(config.batch_size)))  # the same on every process
        for part in self.parts.values():
            calibrate(part, lambda: self.module.eval()(first))
        self.module.train()
        self.remove_unused_adapters()

    # -------------------------------------------------------------------------- measuring

    def measured_texts(self) -> list[str]:
        if not self.config.evaluate_every:
            return []
        return self.subject_test.texts(token=True)

    @cached_property
    def subject_test(self) -> SubjectTest:
        """The prompts that are measured."""
        config = self.config
        name = config.evaluate_prompts or ("world" if config.base in EMBEDDED else "object")
        return SubjectTest(read_prompts(name), (), config.token, config.class_noun)

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        config = self.config
        if not config.evaluate_every:
            return False
        if not self.measuring_started:
            self.measuring_started = True
            if self.accelerator.is_main_process:
                measuring.truncate_measurements(run, step - 1 if step > 1 else -1)
            if broadcast_first(not measuring.load_measurements(run)):
                with disable_adapters(*self.parts.values()):
                    self.measure(run, 0)
        if step % config.evaluate_every and step < config.steps:
            return False
        with_average(lambda: self.measure(run, step))
        return self.accelerator.is_main_process and measuring.has_stopped_improving(
            measuring.Series.load(run), config.patience
        )

    @cached_property
    def validation_scorer(self) -> ValidationScorer:
        """What images are measured by."""
        return ValidationScorer(
            ClipScorer(self.config.evaluate_clip or None),
            [load_rgb(path) for path in self.measured_photos],
            self.subject_test.texts(token=True),
            self.subject_test.texts(token=False),
            [load_rgb(path) for path in self.trained_photos],
        )

    def measure(self, run: Run, step: int) -> None:
        """Draws the test prompts, writes their figures down and keeps the adapter as it is."""
        texts = self.subject_test.texts(token=True)
        images = self.draw(texts, [self.config.seed + 5000 + number for number in range(len(texts))])
        if not self.accelerator.is_main_process:
            return
        one = self.validation_scorer.measure(step, images)
        measuring.record_measurement(run, one, self.save_adapter)
        means = {"likeness": fmean(one.likeness), "prompt_fidelity": fmean(one.fidelity)}
        run.append_metrics(step=step, likeness_real=self.validation_scorer.real, **means)
        run.append_log(f"step {step}  likeness {means['likeness']:.4f}  prompt fidelity {means['prompt_fidelity']:.4f}")

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """Keeps the best of the measured steps, if so wished."""
        if accelerator.is_main_process and self.config.keep == "best":
            choice = measuring.choose_step([measuring.Series.load(run)])
            measuring.keep_step(run, choice)
            print(measuring.describe_choice(choice))
        return "done"

    def remove_unused_adapters(self) -> None:
        """Takes the adapter off layers that have no part in the loss, found by one backward pass over one row.

        Raises:
            UserError: when that is every layer of a part.
        """
        self.module(self.batch(0, [0])).mean().backward()
        for name, part in self.parts.items():
            if dead := remove_unused_adapters(part):
                if not adapter_layers(part):
                    raise UserError(f"None of the chosen layers of {name} has a part in the prediction: choose others.")
                print(
                    f"{name}: {len(dead)} layers have no part in the prediction and carry no adapter, such as {dead[-1]}"
                )
        self.module.zero_grad(set_to_none=True)

    def may_train_text(self) -> bool:
        return self.config.train_text_encoder or self.config.token_vectors > 0

    def attach(self) -> dict[str, nn.Module]:
        if self.config.token_vectors:
            self.check_token_in_captions()
        parts, self.inversions = attach_subject(self.model, self.config)
        return parts

    def check_token_in_captions(self) -> None:
        """Raises UserError when no image's caption has the token, so that its vectors would never learn."""
        texts, token = list(self.prompts), self.config.token
        if not any(token in texts[number] for rows in self.instance for number in rows.prompts.flatten().tolist()):
            raise UserError(
                f"No caption says {token}, so --token-vectors would learn nothing: put it into the captions, or remove them."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter's parameters, one group per part of the pipeline."""
        config = self.config
        text_rate = config.text_learning_rate or config.learning_rate
        rates = {name: text_rate for name in self.parts} | {self.model.denoiser_name: config.learning_rate}
        return [
            group
            for name, part in self.parts.items()
            for group in parameter_groups(part, rates[name], lora_plus_ratio=config.lora_plus_ratio)
        ]

    def is_dead(self) -> bool:
        """True when the adapter changes nothing in any part."""
        return all(is_dead(unit) for part in self.parts.values() for unit in gathered_units(part))

    def save_adapter(self, folder: Path) -> None:
        """Writes a PEFT folder for each part, and what the adapter was trained on."""
        for name, part in self.parts.items():
            if not hasattr(part, "peft_config"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                native.save_native(part, folder / name)
        if self.inversions:
            words = {f"{name}.{self.config.token}": word.vectors for name, word in self.inversions.items()}
            save_token_embeddings(folder, words)
        facts = self.config.facts | {"adapter": self.config.adapter}
        if self.config.also:
            facts["also"] = ", ".join(self.config.also)
        write_text(folder / "rankfold.json", json.dumps(facts, indent=1))
