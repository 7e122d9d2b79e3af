"""Visual instruction tuning: an adapter on a vision-language model, from conversations about images."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...pipelines.chat import answers
from ...toolkit.adapters.attach import adapter_layers, attach, calibrate, parameter_groups, remove_unused_adapters
from ...toolkit.adapters.auxiliary import auxiliary_losses
from ...toolkit.adapters.fold import is_dead
from ...toolkit.core.devices import supports_pinned_memory
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.core.texts import read_text
from ...toolkit.data.conversations import Conversation
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.formats import native
from ...toolkit.vlm.chat_tokens import IGNORE
from ...toolkit.vlm.model import VisionLanguageModel, check_attention, resolve_vision_base
from ...toolkit.vlm.packing import pack_rows
from ..config.instruct import ConversationConfig, InstructConfig
from ..config.peft_config import peft_config
from ..engine.processes import num_processes
from ..engine.sharding import check_sharding, gathered_units, ignore_shards_in_ddp, shard
from .conversations import (
    ConversationBatches,
    PlannedRows,
    Prefetcher,
    Sampler,
    data_certificate,
    load_images,
    plan_rows,
    verify_rows,
)

ADAPTER_FOLDER = "model"  # what the adapter's folder is called


@dataclass(frozen=True)
class PreparedData:
    """What the checks found: rows, planned and proven."""

    data: PlannedRows
    replay: PlannedRows
    certificates: list[dict[str, Any]]


def prepare_instruct(config: InstructConfig) -> tuple[InstructConfig, tuple[Any, ...]]:
    """Checks the settings and reads the data; no model is loaded, only its processor."""
    peft_config(config, config.target_modules or ("q_proj",))
    check_sharding(config, num_processes())
    if config.train_projector and "projector" in config.adapt:
        raise UserError("--train-projector and --adapt projector both change the projector: leave one of them out.")
    return prepare_conversations(config)


def prepare_conversations(config: Any) -> tuple[Any, tuple[Any, ...]]:
    """The config with its number of steps; the data and the base's folder."""
    if config.data is None:
        raise UserError("--data is missing: give a file with conversations about images.")
    base = resolve_vision_base(config.base)
    check_attention(config.attention)
    vision = VisionLanguageModel(base, template=read_chat_template(config), pad_to_square=config.pad_to_square)
    chat, family = vision.chat, vision.family
    planned, certificates = [], []
    for file in (config.data, config.replay):
        rows = plan_rows(file, config, chat) if file else PlannedRows()
        if file:
            certificates.append(data_certificate(file, rows, chat, verify_rows(rows, chat)))
        planned.append(rows)
    if config.packing and not family.supports_packing:
        raise UserError(
            f"--packing does not work with {config.base}: in its attention the questions of packed rows would see one another."
        )
    found = PreparedData(planned[0], planned[1], certificates)
    if config.epochs is not None:
        window = config.batch_size * config.gradient_accumulation
        config = replace(config, steps=max(1, math.ceil(config.epochs * rows_per_epoch(config, found) / window)))
    return config, (found, base)


def read_chat_template(config: ConversationConfig) -> str | None:
    """The chat template that the user gives."""
    if config.chat_template is None:
        return None
    try:
        return read_text(config.chat_template)
    except OSError as error:
        raise UserError(f"--chat-template {config.chat_template} cannot be read: {error.strerror}.") from error


def num_replayed(config: ConversationConfig, found: PreparedData) -> int:
    """Rows of the replay in one pass over the data."""
    if not len(found.replay):
        return 0
    return max(1, round(len(found.data) * config.replay_share / (1 - config.replay_share)))


def rows_per_epoch(config: ConversationConfig, found: PreparedData) -> int:
    """Rows of one pass over the data, those of the replay counted."""
    return len(found.data) + num_replayed(config, found)


class AnswerLoss(nn.Module):
    """The model with the loss of what it is to answer as its forward, so that one module is all DDP has to wrap."""

    def __init__(self, model: nn.Module, *, packing: bool = False) -> None:
        """packing: rows end to end in one sequence, see `pack_rows`."""
        super().__init__()
        self.model, self.packing = model, packing

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Loss of each row, (B,): cross-entropy summed over its learned tokens, times `weight`.

        Logits are made only where some row learns a token: most tokens are images and questions.
        """
        inputs = {key: value for key, value in batch.items() if key != "weight"}
        count = len(inputs["labels"])
        rows = torch.arange(count, device=inputs["labels"].device)[:, None]
        if self.packing:
            inputs, rows = pack_rows(self.model, inputs)
            rows = rows[None]
        labels = inputs.pop("labels")
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # what each token is to say next
        places = (target != IGNORE).any(0).nonzero()[:, 0]
        with auxiliary_losses(inputs.get("attention_mask")) as auxiliary:
            logits = self.model(**inputs, logits_to_keep=places, use_cache=False).logits
        target, rows = target[:, places], rows.expand(*labels.shape)[:, places]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
        sums = torch.zeros(count, device=losses.device).index_add(0, rows.flatten(), losses)
        return sums * batch["weight"] + auxiliary.total()


class ConversationTask:
    """What every Task on conversations shares. A sub-class says what is trained, in `attach`."""

    shards_base = False
    """Whether the frozen language model is sharded over the processes."""

    def __init__(self, config: Any, data: PreparedData, base: str, accelerator: Accelerator) -> None:
        self.config, self.data, self.accelerator, self.device = config, data, accelerator, accelerator.device
        self.vision = VisionLanguageModel(
            base,
            DTYPES[config.precision],
            "cpu" if self.shards_base else accelerator.device,  # where it is sharded, no device need hold it whole
            config.quantize,
            template=read_chat_template(config),
            pad_to_square=config.pad_to_square,
            attention=config.attention,
        )
        self.build_rows = data.data.rows + data.replay.rows
        self.num_learned = data.data.num_learned + data.replay.num_learned
        self.sampler = Sampler(
            lengths=tuple(data.data.lengths + data.replay.lengths),
            num_data=len(data.data),
            num_replayed=num_replayed(config, data),
            batch_size=config.batch_size,
            group_by_length=config.group_by_length,
            seed=config.seed,
        )
        self.prefetcher: Prefetcher | None = None
        model = self.vision.model
        torch.manual_seed(config.seed)  # after the loading, which draws numbers too
        self.attach(model)
        if self.shards_base:
            shard(model, self.vision.language_blocks(), self.device)
            self.vision.device = self.device
        if config.compile:
            model.compile()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.module = AnswerLoss(model, packing=config.packing).train()
        if self.shards_base:
            ignore_shards_in_ddp(self.module)
        self.parts = {ADAPTER_FOLDER: model}

    def attach(self, model: nn.Module) -> None:
        """Puts what is trained on the model, which comes frozen."""
        raise NotImplementedError

    def after_step(self, run: Run, step: int, with_average: Callable[[Callable[[], None]], None]) -> bool:
        """Nothing."""
        return False

    def conclude(self, run: Run, accelerator: Accelerator) -> str:
        """What comes after the last step: nothing."""
        return "done"

    # -------------------------------------------------------------------------- data

    def batch(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`, weighed so that every learned token counts alike."""
        number = position // self.config.batch_size
        if self.prefetcher is None:
            reading = ConversationBatches(self.build_rows, self.sampler, self.vision.chat, slots)
            self.prefetcher = Prefetcher(reading, self.config.workers, supports_pinned_memory(self.device))
        return self.vision.to_device(self.prefetcher.fetch(number)) | {
            "weight": torch.tensor(self.weight(number), device=self.device)
        }

    def weight(self, number: int) -> float:
        """Rows over learned tokens, in the window of forward passes that make up this one's optimizer step."""
        config = self.config
        first = number - number % config.gradient_accumulation
        window = [row for n in range(first, first + config.gradient_accumulation) for row in self.sampler.rows(n)]
        return len(window) / sum(self.num_learned[row] for row in window)

    def example_batch(self) -> dict[str, torch.Tensor]:
        """One row as a batch, with an image if there is one."""
        row = next((row for row in self.build_rows if row.images), self.build_rows[0])
        return self.vision.to_device(self.vision.chat.collate([row], [load_images(row)])) | {
            "weight": torch.ones((), device=self.device)
        }

    # -------------------------------------------------------------------------- previews

    def preview(self) -> list[str]:
        """The first rows' first questions, what the data answer and what the model does, as JSON."""
        rows = self.build_rows[: self.config.preview_rows]
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


class InstructTask(ConversationTask):
    """The Task of visual instruction tuning."""

    config: InstructConfig

    def __init__(self, config: InstructConfig, data: PreparedData, base: str, accelerator: Accelerator) -> None:
        self.shards_base = config.shard_base
        super().__init__(config, data, base, accelerator)
        batch = self.example_batch()
        calibrate(self.vision.model, lambda: self.module.eval()(batch))
        self.module.train()
        self.remove_unused_adapters(batch)
        if accelerator.is_main_process:
            print(self.describe_layers())

    def attach(self, model: nn.Module) -> None:
        config = self.config
        targets = config.target_modules or tuple(self.vision.linear_layers(config.adapt))
        wanted = peft_config(config, targets)
        if config.train_projector:
            wanted.modules_to_save = self.vision.projectors()  # type: ignore[attr-defined]
        if config.vision_alpha is not None:
            wanted.alpha_pattern = {rf"{re.escape(self.vision.family.tower)}\..*": config.vision_alpha}  # type: ignore[attr-defined]
        attach(model, wanted, field="--target-modules" if config.target_modules else "--adapt")

    def remove_unused_adapters(self, batch: dict[str, torch.Tensor]) -> None:
        """Takes the adapter off layers that have no part in the loss, such as the tower's last ones under LLaVA's feature layer -2.

        Raises:
            UserError: when that is every layer.
        """
        self.module(batch).mean().backward()
        self.unused_layers = remove_unused_adapters(self.vision.model)
        if not adapter_layers(self.vision.model):
            raise UserError("None of the chosen layers has a part in the answers: choose others with --adapt.")
        self.module.zero_grad(set_to_none=True)

    def describe_layers(self) -> str:
        """What is trained, in lines: part, number of layers, their kinds, parameters."""
        layers: dict[str, list[str]] = {}
        for name in adapter_layers(self.vision.model):
            layers.setdefault(self.vision.part_name(name), []).append(name)
        lines = []
        for part, names in layers.items():
            kinds = sorted({name.rpartition(".")[2] for name in names})
            size = sum(
                p.numel()
                for name in names
                for p in self.vision.model.get_submodule(name).parameters()
                if p.requires_grad
            )
            lines.append(f"{part:15} {len(names):4} layers ({', '.join(kinds)}), {size:,} parameters")
        if self.config.train_projector:
            size = sum(p.numel() for p in self.projector_parameters())
            lines.append(f"{'projector':15} in full, {size:,} parameters")
        if self.unused_layers:
            lines.append(
                f"{len(self.unused_layers)} layers have no part in the answers and carry no adapter, such as {self.unused_layers[-1]}"
            )
        return "\n".join(lines)

    def projector_parameters(self) -> list[nn.Parameter]:
        """The projector's parameters that are trained in full."""
        return [
            parameter
            for module in self.vision.model.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for parameter in module.modules_to_save.parameters()
            if parameter.requires_grad
        ]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter's parameters, and the projector's with a rate of their own."""
        config, own = self.config, {id(parameter) for parameter in self.projector_parameters()}
        groups = parameter_groups(self.vision.model, config.learning_rate, lora_plus_ratio=config.lora_plus_ratio)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if own:
            groups.append(
                {"params": self.projector_parameters(), "lr": config.projector_learning_rate or config.learning_rate}
            )
        return [group for group in groups if group["params"]]

    def is_dead(self) -> bool:
        """True when the adapter changes nothing."""
        return all(is_dead(unit) for unit in gathered_units(self.vision.model))

    def save_adapter(self, folder: Path) -> None:
        """Writes a PEFT folder, the chat template, and what the adapter was trained on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            native.save_native(self.vision.model, folder / ADAPTER_FOLDER)
        save_facts(folder, self.config.base, self.config.adapter, self.vision, self.data)


def save_facts(folder: Path, base: str, adapter: str, vision: VisionLanguageModel, data: PreparedData) -> None:
    """Writes rankfold.json, with a certificate for each data file, and the template."""
    facts = {"base": base, "kind": vision.config["model_type"], "adapter": adapter, "data": data.certificates}
    facts["pad_to_square"] = vision.chat.pad_to_square
    write_text(folder / "rankfold.json", json.dumps(facts, indent=1))
    write_text(folder / "chat_template.jinja", str(vision.processor.chat_template))
