"""The supernet of a structure search, as what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...toolkit.adapters.attach import parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.adapters.variants.glora import CHOICES
from ...toolkit.adapters.variants.glora_supernet import LARGEST, GloraSupernetConfig, supernet_layers
from ...toolkit.core.errors import UserError
from ..config.search import InstructSearchConfig, SearchConfig, SearchSettings
from .evolution import SearchSpace, check_evolution
from .paths import choices_of


def check_search(config: SearchSettings) -> None:
    """Checks the settings of the search that need neither images nor a model.

    Raises:
        UserError: for a choice that does not exist, or settings that cannot work.
    """
    for part, known in CHOICES.items():
        own = choices_of(config, part)
        wrong = [choice for choice in own if choice not in known]
        if wrong or not own or len(set(own)) < len(own):
            raise UserError(f"--choices-{part} must name some of {', '.join(known)}, each once, not '{' '.join(own)}'.")
    check_evolution(config, SearchSpace(costs=((0,),), limit=0))
    supernet_config(config, ["any"])


def supernet_config(config: SearchSettings, targets: Sequence[str]) -> GloraSupernetConfig:
    """The PEFT config of the supernet."""
    try:
        return GloraSupernetConfig(r=config.rank, target_modules=list(targets), form=config.form, a_rate=config.a_rate)
    except ValueError as error:
        raise UserError(str(error)) from error


class Supernet:
    """The trainable of a structure search: all choices of every layer."""

    def __init__(
        self, config: SearchConfig | InstructSearchConfig, attach_to: Callable[..., dict[str, nn.Module]]
    ) -> None:
        """attach_to: (model, config, target modules -> PEFT config) puts an adapter on a kind of model, and returns its parts."""
        self.config, self.attach_to = config, attach_to
        self.may_change_text = isinstance(config, SearchConfig) and config.train_text_encoder
        self.token_embeddings: dict[str, torch.Tensor] = {}
        """None."""
        self.parts: dict[str, nn.Module] = {}

    def attach(self, model: Any) -> dict[str, nn.Module]:
        """Puts the supernet on the model."""
        self.parts = self.attach_to(model, self.config, lambda targets: supernet_config(self.config, targets))
        return self.parts

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The supernet's tensors."""
        return [group for part in self.parts.values() for group in parameter_groups(part, self.config.learning_rate)]

    def is_dead(self) -> bool:
        """True when the largest path changes nothing; it is at work behind this."""
        for part in self.parts.values():
            for layer in supernet_layers(part).values():
                layer.path["default"] = LARGEST
        return all(is_dead(part) for part in self.parts.values())

    def save(self, folder: Path) -> None:
        """Nothing: the checkpoint holds the supernet, and the adapter is the winner's."""
