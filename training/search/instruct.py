"""Structure search for visual instruction tuning: structures are judged by the loss of the answers to held-out conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from accelerate import Accelerator

from ...toolkit.core.errors import UserError
from ...toolkit.vlm.model import VisionLanguageModel
from ..config.instruct import InstructConfig
from ..config.search import InstructSearchConfig
from ..instruct.adapter import attach_to_vision_model
from ..instruct.conversations import PlannedRows, plan_rows
from ..instruct.prepare import PreparedData, prepare_conversations, processor_options
from ..instruct.task import save_facts
from ..instruct.training import ConversationTraining, load_vision_model, prepare_conversation_training
from .supernet import Supernet, check_search
from .task import SupernetTask


def prepare_instruct_search(config: InstructSearchConfig) -> tuple[InstructSearchConfig, tuple[Any, ...]]:
    """Checks the settings, reads the data and takes what is held out off them; no model is loaded, only its processor.

    Raises:
        UserError: as `prepare_conversations` does, and when there is too little to hold some out.
    """
    check_search(config)
    config, (found, base) = prepare_conversations(config)
    if config.held_out is not None:
        chat = VisionLanguageModel(base, **processor_options(config)).chat
        return config, (found, plan_rows(config.held_out, config, chat), base)
    data = found.data
    if len(data) < 2:
        raise UserError("--data holds one row, so none can be held out: add rows, or give others with --held-out.")
    count = min(max(1, round(config.held_out_share * len(data))), len(data) - 1)
    out = set(Random(f"{config.search_seed}/held out").sample(range(len(data)), count))
    kept, held_out = (data.select([n for n in range(len(data)) if (n in out) == side]) for side in (False, True))
    return config, (replace(found, data=kept), held_out, base)


class InstructSearchTask(SupernetTask[ConversationTraining]):
    """The Task of training the supernet, with another path in every step, and the search behind it."""

    retrained_config = InstructConfig

    def __init__(
        self,
        config: InstructSearchConfig,
        data: PreparedData,
        held_out: PlannedRows,
        base: str,
        accelerator: Accelerator,
        judge: Callable[[InstructSearchTask], float] | None = None,
    ) -> None:
        """judge: fitness of the task's model as it stands, higher is better; None is by the held-out loss."""
        supernet, vision = Supernet(config, attach_to_vision_model), load_vision_model(config, base, accelerator)
        training = prepare_conversation_training(config, vision, data, supernet, accelerator)
        super().__init__(config, training, supernet, judge)
        self.data, self.held_out = data, held_out

    def held_out_loss(self) -> float:
        """Cross-entropy of the held-out answers, each token counting by its weight."""
        self.module.eval()
        return sum(self.training.row_losses(self.held_out)) / sum(self.held_out.weights)

    def save_facts(self, folder: Path) -> None:
        """Writes what the winner's folder tells of itself."""
        save_facts(folder, self.config.base, "glora", self.training.vision, self.data)
