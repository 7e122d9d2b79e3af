"""Subject-driven training (DreamBooth): a new adapter on a frozen model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..toolkit.adapters.attach import adapter_layers, calibrate, drop_unused, parameter_groups
from ..toolkit.adapters.fold import is_dead
from ..toolkit.data.subjects import Sample
from ..toolkit.errors import UserError
from ..toolkit.formats import native
from ..toolkit.models.new_words import NewWords, learn_word, save_words
from ..toolkit.runs import write_text
from .adapter_config import adapter_config
from .config import SubjectConfig
from .denoising import attach_to_parts
from .pictures import PictureTask


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
        super().__init__(config, samples, base, accelerator, held_out)
        first = self.batch(0, list(range(config.batch_size)))  # the same on every process
        for part in self.parts.values():
            calibrate(part, lambda: self.module.eval()(first))
        self.module.train()
        self.leave_out_unused()

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
        """Puts the adapter on the model, and the token into its text encoders when it is to be a word of its own."""
        config, model = self.config, self.model
        self.new_words: dict[str, NewWords] = {}
        if config.token_vectors:
            self.check_token_is_said()
            self.new_words = learn_word(model, config.token, config.token_vectors, config.class_noun)
        parts = attach_to_parts(model, config, lambda targets: adapter_config(config, targets))
        for word in self.new_words.values():
            word.vectors.requires_grad_(True)  # attaching has frozen all else
        return parts | {name: getattr(model, name) for name in self.new_words}

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
        return all(is_dead(part) for part in self.parts.values())

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
        facts = {"base": self.config.base, "token": self.config.token, "class_noun": self.config.class_noun}
        if self.config.also:
            facts["also"] = ", ".join(self.config.also)
        write_text(folder / "rankfold.json", json.dumps(facts | {"adapter": self.config.adapter}, indent=1))
