"""Training on conversations about images: a loaded model, its rows, and what is trained, made ready step by step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ...pipelines.chat import answers
from ...toolkit.core.devices import supports_pinned_memory, to_float64
from ...toolkit.data.conversations import Conversation
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.vlm.model import VisionLanguageModel
from ..config.instruct import ConversationConfig
from ..engine.processes import map_distributed
from ..engine.sharding import ignore_shards_in_ddp, shard
from ..engine.task import Trainable
from .conversations import ConversationBatches, PlannedRows, Prefetcher, Sampler, load_images
from .loss import AnswerLoss
from .prepare import PreparedData, num_replayed, processor_options

MEASURED_ROWS = 16  # of a forward pass without gradients


class ConversationTraining:
    """A vision-language model with a trainable on it, and conversations: loss, batches and previews."""

    def __init__(
        self,
        config: ConversationConfig,
        vision: VisionLanguageModel,
        data: PreparedData,
        parts: dict[str, nn.Module],
        module: AnswerLoss,
    ) -> None:
        """parts: those of the model that are trained; module: the loss of the model."""
        self.config, self.vision, self.parts, self.module = config, vision, parts, module
        self.rows = [row for group in data.groups for row in group.rows]
        self.learned_weights = [weight for group in data.groups for weight in group.weights]
        self.sampler = Sampler(
            lengths=tuple(length for group in data.groups for length in group.lengths),
            num_data=len(data.data),
            num_replayed=num_replayed(config, data),
            batch_size=config.batch_size,
            group_by_length=config.group_by_length,
            seed=config.seed,
            more=data.seen_of_more,
        )
        self.prefetcher: Prefetcher | None = None
        """Started with the first batch, which says what slots this process has."""

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`, weighed so that every learned token counts by its weight."""
        number = position // self.config.batch_size
        self.prefetcher = self.prefetcher or self.start_prefetcher(slots)
        return self.vision.to_device(self.prefetcher.fetch(number)) | {
            "weight": torch.tensor(self.weight(number), device=self.vision.device)
        }

    def start_prefetcher(self, slots: list[int]) -> Prefetcher:
        """A reader of these rows of every forward pass."""
        batches = ConversationBatches(self.rows, self.sampler, self.vision.chat, slots)
        return Prefetcher(batches, self.config.workers, supports_pinned_memory(self.vision.device))

    def weight(self, number: int) -> float:
        """Rows over the weight of learned tokens, in the window of forward passes that make up this one's optimizer step."""
        config = self.config
        first = number - number % config.gradient_accumulation
        window = [row for n in range(first, first + config.gradient_accumulation) for row in self.sampler.rows(n)]
        return len(window) / sum(self.learned_weights[row] for row in window)

    def example_batch(self) -> dict[str, torch.Tensor]:
        """One row as a batch, with an image if there is one."""
        row = next((row for row in self.rows if row.images), self.rows[0])
        return self.vision.to_device(self.vision.chat.collate([row], [load_images(row)])) | {
            "weight": torch.ones((), device=self.vision.device)
        }

    @torch.no_grad()
    def row_losses(self, planned: PlannedRows) -> list[float]:
        """Cross-entropy of each row's answers, summed over the tokens by their weights; in shares. The module must be in eval mode."""
        order = sorted(range(len(planned)), key=lambda n: planned.lengths[n])
        batches = [order[start : start + MEASURED_ROWS] for start in range(0, len(order), MEASURED_ROWS)]
        one = torch.ones((), device=self.vision.device)

        def losses(numbers: list[int]) -> list[float]:
            rows = [planned.rows[n] for n in numbers]
            batch = self.vision.to_device(self.vision.chat.collate(rows, [load_images(row) for row in rows]))
            return to_float64(self.module(batch | {"weight": one})).tolist()

        found: dict[int, float] = {}
        for numbers, values in zip(batches, map_distributed(batches, losses), strict=True):
            found |= dict(zip(numbers, values, strict=True))
        return [found[n] for n in range(len(planned))]

    def preview(self) -> list[str]:
        """The first rows' first questions, what the data answer and what the model does, as JSON."""
        rows = self.rows[: self.config.preview_rows]
        if not rows:
            return []
        asked = [row.until(1 + (row.messages[0]["role"] == "system")) for row in rows]
        self.module.eval()
        try:
            said = answers(self.vision, asked, max_new_tokens=self.config.preview_tokens)
        finally:
            self.module.train()
        return [preview_text(*one) for one in zip(rows, asked, said, strict=True)]


def preview_text(row: Conversation, asked: Conversation, said: str) -> str:
    """One preview."""
    words = lambda message: " ".join(part["text"] for part in message["content"] if "text" in part)  # noqa: E731
    shown = {
        "place": row.location,
        "pictures": [str(image) for image in asked.images if isinstance(image, Path)],
        "question": words(asked.messages[-1]),
        "wanted": words(row.messages[len(asked.messages)]),
        "answer": said,
    }
    return json.dumps(shown, indent=1, ensure_ascii=False)


def load_vision_model(
    config: ConversationConfig, base: str, accelerator: Accelerator, *, shard_base: bool = False
) -> VisionLanguageModel:
    """The base that is trained; on the CPU where it will be sharded, so that no device need hold it whole."""
    return VisionLanguageModel(
        base,
        DTYPES[config.precision],
        "cpu" if shard_base else accelerator.device,
        config.quantize,
        **processor_options(config),
        attention=config.attention,
    )


def prepare_conversation_training(
    config: ConversationConfig,
    vision: VisionLanguageModel,
    data: PreparedData,
    trainable: Trainable,
    accelerator: Accelerator,
    *,
    shard_base: bool = False,
) -> ConversationTraining:
    """Puts the trainable on a loaded base, and shards, compiles and checkpoints it as the config says.

    shard_base: the frozen language model is sharded over the processes.

    Raises:
        UserError: when the trainable does not fit the model.
    """
    model = vision.model
    torch.manual_seed(config.seed)  # after the loading, which draws numbers too
    parts = trainable.attach(vision)
    if shard_base:
        shard(model, vision.language_blocks(), accelerator.device)
        vision.device = accelerator.device
    if config.compile:
        model.compile()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = AnswerLoss(model, packing=config.packing).train()
    if shard_base:
        ignore_shards_in_ddp(module)
    return ConversationTraining(config, vision, data, parts, module)
