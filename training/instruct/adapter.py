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

from ...toolkit.adapters.attach import adapter_layers, attach, load_adapter_state, matching_layers, parameter_groups
from ...toolkit.adapters.fold import is_dead
from ...toolkit.core.errors import UserError
from ...toolkit.formats import native
from ...toolkit.formats.adapter_folder import is_native, is_peft_folder
from ...toolkit.formats.locate import adapter_path
from ...toolkit.formats.peft_folder import read_peft_folder
from ...toolkit.formats.vlm_folder import fit_names
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
    if isinstance(config, InstructConfig) and config.freeze:
        targets = unfrozen(vision, config_of(targets), config.freeze)
    wanted = config_of(targets)
    wanted.base_model_name_or_path = base_name(config.base)
    attach(vision.model, wanted, field="--target-modules" if config.target_modules else "--target-parts")
    return {ADAPTER_FOLDER: vision.model}


def unfrozen(vision: VisionLanguageModel, wanted: PeftConfig, freeze: Sequence[str]) -> tuple[str, ...]:
    """The layers that a config selects, without those whose names hold one of these words.

    Raises:
        UserError: for a word that no such layer's name holds, and when none is left.
    """
    layers = matching_layers(vision.model, wanted)
    for word in freeze:
        if not any(word in name for name in layers):
            raise UserError(
                f"--freeze {word}: none of the layers that get the adapter has this in its name, such as {layers[0]}."
            )
    left = tuple(name for name in layers if not any(word in name for word in freeze))
    if not left:
        raise UserError(f"--freeze {' '.join(freeze)} leaves no layer to train.")
    return left


class InstructAdapter:
    """The trainable of visual instruction tuning."""

    def __init__(self, config: InstructConfig) -> None:
        self.config = config
        self.parts: dict[str, nn.Module] = {}

    def attach(self, model: VisionLanguageModel) -> dict[str, nn.Module]:
        """Puts the adapter on the model, and makes its projector trainable in full by choice."""
        self.vision = model
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
        groups = self.split_by_part(groups)
        if own:
            groups.append(
                {"params": self.projector_parameters(), "lr": config.projector_learning_rate or config.learning_rate}
            )
        return [group for group in groups if group["params"]]

    def split_by_part(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups with the rates that tower and projector have of their own."""
        config = self.config
        rates = {"vision tower": config.vision_learning_rate, "projector": config.projector_learning_rate}
        part_of = {
            id(parameter): self.vision.part_name(name)
            for name, layer in adapter_layers(self.vision.model).items()
            for parameter in layer.parameters()
        }
        split = []
        for group in groups:
            parts: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                rate = rates.get(part_of.get(id(parameter), "")) or config.learning_rate
                parts.setdefault(group["lr"] * rate / config.learning_rate, []).append(parameter)
            split += [group | {"params": parameters, "lr": rate} for rate, parameters in parts.items()]
        return split

    def start_from(self, path: Path) -> None:
        """Gives the adapter the weights of another one.

        Raises:
            UserError: when that one is of another kind, rank, alpha, or on other layers.
        """
        place = adapter_path(path)
        folder = place / ADAPTER_FOLDER if is_native(place) else place
        if not is_peft_folder(folder):
            raise UserError(f"--start-from {path} holds no adapter of a vision-language model.")
        model = self.vision.model
        theirs, state = fit_names(model, *read_peft_folder(folder), folder)
        own: Any = model.peft_config["default"]
        kind = str(getattr(theirs.peft_type, "value", theirs.peft_type))
        if kind != str(getattr(own.peft_type, "value", own.peft_type)):
            raise UserError(f"--start-from {path} is an adapter of kind {kind}: give the same with --adapter.")
        for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
            if getattr(theirs, name, None) != getattr(own, name, None):
                raise UserError(
                    f"--start-from {path} has {name} {getattr(theirs, name, None)}, this run {getattr(own, name, None)}: give the same "
                    "with --rank and --alpha."
                )
        try:
            load_adapter_state(model, state)
        except UserError as error:
            raise UserError(f"--start-from {path}: {error} The run must train the same layers.") from error

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
