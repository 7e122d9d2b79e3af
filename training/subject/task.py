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

from ...toolkit.adapters.attach import adapter_layers, adapters_off, calibrate, drop_unused, parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.data.images import load_rgb
from ...toolkit.data.subjects import Sample, find_samples
from ...toolkit.diffusion.load import EMBEDDED
from ...toolkit.diffusion.model import PictureModel
from ...toolkit.diffusion.textual_inversion import NewWords, learn_word, save_words
from ...toolkit.formats import native
from ...toolkit.metrics.clip import ClipScorer
from ..config.peft_config import adapter_config
from ..config.subject import SubjectConfig
from ..engine.processes import first_says
from ..engine.sharding import units
from ..evaluation import measuring
from ..evaluation.measuring import Yardstick
from ..evaluation.subject import SubjectTest, read_prompts
from .denoising import attach_to_parts
from .images import PictureTask

LEAST_PHOTOS = 4  # of which one can be held out


def attach_subject(model: PictureModel, config: SubjectConfig) -> tuple[dict[str, nn.Module], dict[str, NewWords]]:
    """Puts the adapter on a model, and the token into its text encoders when it is to be a word of its own.

    Returns the parts that are trained, and the words by text encoder.
    """
    words = learn_word(model, config.token, config.token_vectors, config.class_noun) if config.token_vectors else {}
    parts = attach_to_parts(model, config, lambda targets: adapter_config(config, targets))
    for word in words.values():
        word.vectors.requires_grad_(True)  # attaching has frozen all else
    return parts | {name: getattr(model, name) for name in words}, words


def measured_by(config: SubjectConfig, samples: list[Sample]) -> tuple[list[Sample], list[Path]]:
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
    if len(files) < LEAST_PHOTOS:
        raise UserError(
            f"--images holds {len(files)} photos, too few to hold one out for --evaluate-every: add photos up to {LEAST_PHOTOS}, or give "
            "others with --evaluate-images."
        )
    out = set(Random(f"{config.seed}/measured by").sample(files, max(1, len(files) // 5)))
    return [sample for sample in samples if sample.path not in out], sorted(out)


class SubjectTask(PictureTask):
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
        samples, self.measured_by = measured_by(config, samples)
        self.shares_base = config.shard_base
        super().__init__(config, samples, base, accelerator, held_out)
        self.measures = False
        self.trained_photos = [sample.path for sample in samples if not sample.flip]
        first = self.batch(0, list(range(config.batch_size)))  # the same on every process
        for part in self.parts.values():
            calibrate(part, lambda: self.module.eval()(first))
        self.module.train()
        self.leave_out_unused()

    # -------------------------------------------------------------------------- measuring

    def measured_texts(self) -> list[str]:
        if not self.config.evaluate_every:
            return []
        return self.test.texts(token=True)

    @cached_property
    def test(self) -> SubjectTest:
        """The prompts that are measured."""
        config = self.config
        name = config.evaluate_prompts or ("world" if config.base in EMBEDDED else "object")
        return SubjectTest(read_prompts(name), (), config.token, config.class_noun)

    def after_step(self, run: Run, step: int, averaged: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        config = self.config
        if not config.evaluate_every:
            return False
        if not self.measures:
            self.measures = True
            if self.accelerator.is_main_process:
                measuring.cut(run, step - 1 if step > 1 else -1)
            if first_says(not measuring.recorded(run)):
                with adapters_off(*self.parts.values()):
                    self.measure(run, 0)
        if step % config.evaluate_every and step < config.steps:
            return False
        averaged(lambda: self.measure(run, step))
        return self.accelerator.is_main_process and measuring.no_more_gain(measuring.Series.of(run), config.patience)

    @cached_property
    def yardstick(self) -> Yardstick:
        """What pictures are measured by."""
        return Yardstick(
            ClipScorer(self.config.evaluate_clip or None),
            [load_rgb(path) for path in self.measured_by],
            self.test.texts(token=True),
            self.test.texts(token=False),
            [load_rgb(path) for path in self.trained_photos],
        )

    def measure(self, run: Run, step: int) -> None:
        """Draws the test prompts, writes their figures down and keeps the adapter as it is."""
        texts = self.test.texts(token=True)
        pictures = self.draw(texts, [self.config.seed + 5000 + number for number in range(len(texts))])
        if not self.accelerator.is_main_process:
            return
        one = self.yardstick.measure(step, pictures)
        measuring.record(run, one, self.save_adapter)
        means = {"likeness": fmean(one.likeness), "prompt_fidelity": fmean(one.fidelity)}
        run.append_metrics(step=step, likeness_real=self.yardstick.real, **means)
        run.append_log(f"step {step}  likeness {means['likeness']:.4f}  prompt fidelity {means['prompt_fidelity']:.4f}")

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """Keeps the best of the measured steps, if so wished."""
        if accelerator.is_main_process and self.config.keep == "best":
            choice = measuring.choose([measuring.Series.of(run)])
            measuring.keep(run, choice)
            print(measuring.told(choice))
        return "done"

    def leave_out_unused(self) -> None:
        """Takes the adapter off layers that have no part in the loss, found by one backward pass over one row.

        Raises:
            UserError: when that is every layer of a part.
        """
        self.module(self.batch(0, [0])).mean().backward()
        for name, part in self.parts.items():
            if dead := drop_unused(part):
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
            self.check_token_is_said()
        parts, self.new_words = attach_subject(self.model, self.config)
        return parts

    def check_token_is_said(self) -> None:
        """Raises UserError when no picture's caption has the token, so that its vectors would never learn."""
        texts, token = list(self.prompts), self.config.token
        if not any(token in texts[number] for rows in self.instance for number in rows.prompts.flatten().tolist()):
            raise UserError(
                f"No caption says {token}, so --token-vectors would learn nothing: put it into the captions, or remove them."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter's parameters, one group a part of the pipeline."""
        config = self.config
        text_rate = config.text_learning_rate or config.learning_rate
        rates = {name: text_rate for name in self.parts} | {self.model.denoiser_name: config.learning_rate}
        return [
            group
            for name, part in self.parts.items()
            for group in parameter_groups(part, rates[name], up_ratio=config.lora_plus_ratio)
        ]

    def is_dead(self) -> bool:
        """True when the adapter changes nothing in any part."""
        return all(is_dead(unit) for part in self.parts.values() for unit in units(part))

    def save_adapter(self, folder: Path) -> None:
        """Writes a PEFT folder for each part, and what the adapter was trained on."""
        for name, part in self.parts.items():
            if not hasattr(part, "peft_config"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                native.save_native(part, folder / name)
        if self.new_words:
            words = {f"{name}.{self.config.token}": word.vectors for name, word in self.new_words.items()}
            save_words(folder, words)
        facts = self.config.facts | {"adapter": self.config.adapter}
        if self.config.also:
            facts["also"] = ", ".join(self.config.also)
        write_text(folder / "rankfold.json", json.dumps(facts, indent=1))
