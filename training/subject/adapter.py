"""The adapter of a subject: on the denoiser and, by choice, on text encoders, with a learned token."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ...toolkit.adapters.attach import adapter_layers, attach, parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.adapters.plugin import pattern_value
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion.model import DiffusionModel
from ...toolkit.diffusion.textual_inversion import TextualInversionEmbedding, add_learned_token, save_token_embeddings
from ...toolkit.formats import native
from ..config.peft_config import peft_config
from ..config.search import SearchConfig
from ..config.subject import SubjectConfig
from ..engine.sharding import gathered_units
from .start_from import attach_start


def attach_to_parts(
    model: DiffusionModel,
    config: SubjectConfig | SearchConfig,
    config_of: Callable[[Sequence[str]], PeftConfig],
    *,
    taken: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """Puts adapters on the denoiser and, by choice, on text encoders; their start depends on the seed alone.

    config_of: the PEFT config for these target modules; taken: parts that carry one already. Returns the parts.
    """
    names = [model.denoiser_name, *(model.text_encoders() if config.train_text_encoder else [])]
    parts = {name: getattr(model, name) for name in names if name not in taken}
    torch.manual_seed(config.seed)  # after the loading, which draws numbers too
    for name, part in parts.items():
        if name == model.denoiser_name:
            targets = config.target_modules or model.default_targets
            if isinstance(config, SubjectConfig) and config.blocks:
                targets = layers_of_blocks(model, targets, config.blocks)
            attach(part, config_of(targets))
        else:
            targets = config.text_target_modules or model.text_targets(name)
            attach(part, config_of(targets), field="--text-target-modules")
    return parts


def layers_of_blocks(model: DiffusionModel, targets: Sequence[str], blocks: str) -> list[str]:
    """Names of the denoiser's target layers in these blocks.

    blocks: a preset of the family, or a regular expression.

    Raises:
        UserError: for no valid expression, or one that matches no such layer.
    """
    try:
        pattern = re.compile(model.block_presets.get(blocks, blocks))
    except re.error as error:
        raise UserError(f"--blocks {blocks} is not a regular expression: {error}.") from error
    endings = tuple(f".{target}" for target in targets)
    found = [name for name, _ in model.denoiser.named_modules() if pattern.search(name) and name.endswith(endings)]
    if not found:
        presets = f" Presets of this family are {', '.join(model.block_presets)}." if model.block_presets else ""
        raise UserError(
            f"--blocks {blocks} matches none of the layers {', '.join(targets)} of the {model.denoiser_name}.{presets}"
        )
    return found


def check_patterns(config: SubjectConfig, parts: dict[str, nn.Module]) -> None:
    """Raises UserError for a pattern of ranks or rates that no adapted layer's name matches."""
    names = [name for part in parts.values() for name in adapter_layers(part)]
    for option, patterns in (("--rank-pattern", config.rank_pattern), ("--lr-pattern", config.lr_pattern)):
        for pattern in patterns:
            if not any(pattern_value({pattern: True}, name, False) for name in names):
                raise UserError(f"{option} {pattern} matches no adapted layer, such as {names[0]}.")


class SubjectAdapter:
    """The trainable of subject-driven training."""

    def __init__(self, config: SubjectConfig) -> None:
        self.config = config
        self.may_change_text = config.train_text_encoder or config.num_vectors > 0
        self.token_embeddings: dict[str, torch.Tensor] = {}
        """None that are frozen."""
        self.inversions: dict[str, TextualInversionEmbedding] = {}
        """The learned token by text encoder."""
        self.parts: dict[str, nn.Module] = {}
        self.learning_rates: dict[str, float] = {}
        """By part."""

    def attach(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """Puts the adapter on a model, and the token into its text encoders when it is to be a word of its own."""
        config = self.config
        if config.num_vectors:
            self.inversions = add_learned_token(model, config.token, config.num_vectors, config.class_noun)
        start = attach_start(model, config) if config.start_from is not None else {}
        self.parts = start | attach_to_parts(
            model, config, lambda targets: peft_config(config, targets), taken=tuple(start)
        )
        check_patterns(config, self.parts)
        for word in self.inversions.values():
            word.vectors.requires_grad_(True)  # attaching has frozen all else
        self.parts |= {name: getattr(model, name) for name in self.inversions}
        text_rate = config.text_learning_rate or config.learning_rate
        self.learning_rates = dict.fromkeys(self.parts, text_rate) | {model.denoiser_name: config.learning_rate}
        return self.parts

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of each part's parameters."""
        return [
            group
            for name, part in self.parts.items()
            for group in parameter_groups(
                part,
                self.learning_rates[name],
                lora_plus_ratio=self.config.lora_plus_ratio,
                lr_pattern=self.config.lr_pattern,
            )
        ]

    def is_dead(self) -> bool:
        """True when the adapter changes nothing in any part."""
        return all(is_dead(unit) for part in self.parts.values() for unit in gathered_units(part))

    def save(self, folder: Path) -> None:
        """Writes a PEFT folder for each part, and the token's vectors."""
        for name, part in self.parts.items():
            if not hasattr(part, "peft_config"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                native.save_native(part, folder / name)
        if self.inversions:
            words = {f"{name}.{self.config.token}": word.vectors for name, word in self.inversions.items()}
            save_token_embeddings(folder, words)
