"""Composition for vision-language models: by fixed weights, by weights learned on a few conversations, or by PEFT's merges."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.core.setting_names import as_flag
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.formats.locate import adapter_facts, adapter_path
from ...toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
from ..config.checks import check_ranges
from ..config.compose import ComposeInstructConfig
from ..engine.task import TrainingTask
from ..instruct.prepare import PreparedData, prepare_conversations, processor_options
from ..instruct.task import vision_facts
from ..instruct.training import ConversationTraining, load_vision_model, prepare_conversation_training
from ..runs import library
from .checks import check_sources
from .fixed import write_composition
from .mixture import AdapterMixture


def prepare_compose_instruct(config: ComposeInstructConfig) -> tuple[ComposeInstructConfig, tuple[Any, ...]]:
    """Checks the adapters and reads the conversations; no model is loaded, only its processor."""
    if config.weights or config.merge:
        raise UserError("With --data the weights are learned: leave --weights and --merge out, or --data.")
    check_sources(config, config.base, resolve_vision_base)
    return prepare_conversations(with_sources_images(config))


def compose_instruct_fixed(
    config: ComposeInstructConfig, keep: Collection[str] = (), still_free: Callable[[], None] = lambda: None
) -> Run:
    """The sum by fixed weights, or PEFT's merge, as a run folder with an adapter.

    keep, still_free: see `prepare_folder`.

    Raises:
        UserError: for adapters that are missing, do not fit the base or each other.
    """
    base, config = check_instruct_fixed(config), with_sources_images(config)
    vision = VisionLanguageModel(base, DTYPES[config.precision], **processor_options(config))
    facts = vision_facts(config.base, vision)
    return write_composition(
        config, lambda: vision, facts, keep, still_free, lambda folder: save_template(folder, vision)
    )


def with_sources_images(config: ComposeInstructConfig) -> ComposeInstructConfig:
    """The config with how its adapters' images were given to the base, where it says nothing of its own.

    Raises:
        UserError: when the adapters were trained with images given in different ways.
    """
    known = [adapter_facts(adapter_path(library.resolve(name))) for name in config.adapters]
    changes: dict[str, Any] = {}
    for name in ("pad_to_square", "max_pixels", "min_pixels", "video_frames"):
        ways = {getattr(own, name) or None for own in known}
        if getattr(config, name):
            continue
        if len(ways) > 1:
            option = as_flag(name)
            raise UserError(
                f"The adapters were trained with different {option}: {', '.join(map(str, ways))}. Give the one to use with {option}."
            )
        changes[name] = next(iter(ways)) or (False if name == "pad_to_square" else None)
    return replace(config, **changes)


def check_instruct_fixed(config: ComposeInstructConfig) -> str:
    """All checks of a composition by fixed weights that need no model; returns the base's folder."""
    check_ranges(config)
    check_sources(config, config.base, resolve_vision_base)
    return resolve_vision_base(config.base)


def save_template(folder: Path, vision: VisionLanguageModel) -> None:
    """Writes the chat template beside an adapter."""
    write_text(folder / "chat_template.jinja", str(vision.processor.chat_template))


class ComposeInstructTask(TrainingTask[ConversationTraining, AdapterMixture]):
    """The Task of learning the weights on a few conversations; all else is frozen."""

    def __init__(self, config: ComposeInstructConfig, data: PreparedData, base: str, accelerator: Accelerator) -> None:
        vision = load_vision_model(config, base, accelerator)
        facts = vision_facts(config.base, vision)
        mixture = AdapterMixture(config, replace(facts, data=tuple(data.certificates)))
        super().__init__(prepare_conversation_training(config, vision, data, mixture, accelerator), mixture)

    def save_adapter(self, folder: Path) -> None:
        """Writes the sum as an ordinary adapter, and the chat template."""
        self.trainable.save(folder)
        save_template(folder, self.training.vision)
