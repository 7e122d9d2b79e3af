"""The adapter of visual instruction tuning: on chosen parts of a vision-language model, with the projector in full by choice."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...toolkit.adapters.attach import adapter_layers, attach, parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.formats import native
from ...toolkit.vlm.model import VisionLanguageModel, base_name
from ..config.instruct import InstructConfig
from ..config.peft_config import peft_config
from ..config.search import InstructSearchConfig
from ..engine.sharding import gathered_units

ADAPTER_FOLDER = "model"  # what the adapter's folder is called


def attach_to_vision_model(
    vision: VisionLanguageModel,
    config: InstructConfig | InstructSearchConfig,
    config_of: Callable[[Sequence[str]], PeftConfig],
) -> dict[str, nn.Module]:
    """Puts an adapter on the chosen layers. config_of: the PEFT config for these target modules. Returns the model, by name."""
    targets = config.target_modules or tuple(vision.linear_layers(config.target_parts))
    wanted = config_of(targets)
    wanted.base_model_name_or_path = base_name(config.base)
    attach(vision.model, wanted, field="--target-modules" if config.target_modules else "--target-parts")
    return {ADAPTER_FOLDER: vision.model}


class InstructAdapter:
    """The trainable of visual instruction tuning."""

    def __init__(self, config: InstructConfig) -> None:
        self.config = config
        self.parts: dict[str, nn.Module] = {}

    def attach(self, model: VisionLanguageModel) -> dict[str, nn.Module]:
        """Puts the adapter on the model, and makes its projector trainable in full by choice."""
        self.parts = attach_to_vision_model(model, self.config, lambda targets: self.peft_config(model, targets))
        return self.parts

    def peft_config(self, vision: VisionLanguageModel, targets: Sequence[str]) -> PeftConfig:
        """The PEFT config for these target modules of a model."""
        config = self.config
        wanted = peft_config(config, targets)
        if config.train_projector:
            wanted.modules_to_save = vision.projectors()  # type: ignore[attr-defined]
        if config.vision_alpha is not None:
            wanted.alpha_pattern = {rf"{re.escape(vision.family.tower)}\..*": config.vision_alpha}  # type: ignore[attr-defined]
        return wanted

    def projector_parameters(self) -> list[nn.Parameter]:
        """The projector's parameters that are trained in full."""
        return [
            parameter
            for part in self.parts.values()
            for module in part.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for parameter in module.modules_to_save.parameters()
            if parameter.requires_grad
        ]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter's parameters, and the projector's with a rate of their own."""
        config, own = self.config, {id(parameter) for parameter in self.projector_parameters()}
        groups = [
            group
            for part in self.parts.values()
            for group in parameter_groups(part, config.learning_rate, lora_plus_ratio=config.lora_plus_ratio)
        ]
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if own:
            groups.append(
                {"params": self.projector_parameters(), "lr": config.projector_learning_rate or config.learning_rate}
            )
        return [group for group in groups if group["params"]]

    def is_dead(self) -> bool:
        """True when the adapter changes nothing."""
        return all(is_dead(unit) for part in self.parts.values() for unit in gathered_units(part))

    def save(self, folder: Path) -> None:
        """Writes a PEFT folder."""
        for name, part in self.parts.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                native.save_native(part, folder / name)

    def describe(self, vision: VisionLanguageModel) -> list[str]:
        """What is trained, in lines: part, number of layers, their kinds, parameters."""
        layers: dict[str, list[str]] = {}
        for name in adapter_layers(vision.model):
            layers.setdefault(vision.part_name(name), []).append(name)
        lines = []
        for part, names in layers.items():
            kinds = sorted({name.rpartition(".")[2] for name in names})
            size = sum(
                p.numel() for name in names for p in vision.model.get_submodule(name).parameters() if p.requires_grad
            )
            lines.append(f"{part:15} {len(names):4} layers ({', '.join(kinds)}), {size:,} parameters")
        if self.config.train_projector:
            size = sum(p.numel() for p in self.projector_parameters())
            lines.append(f"{'projector':15} in full, {size:,} parameters")
        return lines
