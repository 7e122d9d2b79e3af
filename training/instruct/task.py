"""Visual instruction tuning: an adapter on a vision-language model, from conversations about images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ...toolkit.adapters.attach import adapter_layers
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.formats.adapter_facts import AdapterFacts
from ...toolkit.vlm.model import VisionLanguageModel
from ..config.instruct import InstructConfig
from ..engine.attaching import calibrate_adapters, drop_unused_layers
from ..engine.task import TrainingTask
from .adapter import ADAPTER_FOLDER, InstructAdapter
from .measuring import InstructMeasuring
from .prepare import PreparedData
from .training import ConversationTraining, load_vision_model, prepare_conversation_training


class InstructTask(TrainingTask[ConversationTraining, InstructAdapter]):
    """The Task of visual instruction tuning."""

    def __init__(self, config: InstructConfig, data: PreparedData, base: str, accelerator: Accelerator) -> None:
        adapter = InstructAdapter(config)
        vision = load_vision_model(config, base, accelerator, shard_base=config.shard_base)
        training = prepare_conversation_training(
            config, vision, data, adapter, accelerator, shard_base=config.shard_base
        )
        batch = training.example_batch()
        calibrate_adapters(training.module, training.parts, batch)
        unused = drop_unused_layers(training.module, training.parts, batch)
        if not adapter_layers(vision.model):
            raise UserError("None of the chosen layers has a part in the answers: choose others with --target-parts.")
        if config.start_from is not None:
            adapter.start_from(config.start_from)
        if accelerator.is_main_process:
            print("\n".join([*adapter.describe(vision), *describe_unused(unused[ADAPTER_FOLDER])]))
        super().__init__(training, adapter)
        self.config, self.data = config, data
        self.measuring = (
            InstructMeasuring(config, training, data.held_out, accelerator, self.save_adapter)
            if config.evaluate_every
            else None
        )

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Measures when it is time to; True when there is no more gain."""
        return self.measuring is not None and self.measuring.after_step(run, step, with_average)

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """Keeps the best of the measured steps, if so wished."""
        if self.measuring is not None:
            self.measuring.conclude(run)
        return "done"

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter, the chat template, and what it was trained on."""
        self.trainable.save(folder)
        save_facts(folder, self.config.base, self.config.adapter, self.training.vision, self.data)


def describe_unused(layers: list[str]) -> list[str]:
    """Layers without a part in the answers, such as the tower's last ones under LLaVA's feature layer -2, in a line at most."""
    if not layers:
        return []
    return [f"{len(layers)} layers have no part in the answers and carry no adapter, such as {layers[-1]}"]


def vision_facts(base: str, vision: VisionLanguageModel) -> AdapterFacts:
    """Which base an adapter is for, and how images and videos were given to it."""
    return AdapterFacts(
        base,
        kind=vision.config["model_type"],
        pad_to_square=vision.chat.pad_to_square,
        max_pixels=vision.max_pixels,
        min_pixels=vision.min_pixels,
        video_frames=vision.chat.videos.limit,
    )


def save_facts(folder: Path, base: str, adapter: str, vision: VisionLanguageModel, data: PreparedData) -> None:
    """Writes rankfold.json, with a certificate for each data file, and the template."""
    replace(vision_facts(base, vision), adapter=adapter, data=tuple(data.certificates)).save(folder)
    write_text(folder / "chat_template.jinja", str(vision.processor.chat_template))
