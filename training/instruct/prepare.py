"""What the checks of visual instruction tuning find before a model is loaded: rows that are planned and proven."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ...toolkit.adapters.base import REGISTRY
from ...toolkit.core.errors import UserError
from ...toolkit.core.setting_names import as_flag
from ...toolkit.core.systems import max_open_files
from ...toolkit.core.texts import read_text
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.vlm.chat_tokens import ChatTokens
from ...toolkit.vlm.model import VisionLanguageModel, check_attention, resolve_vision_base
from ..config.instruct import ConversationConfig, InstructConfig
from ..config.peft_config import peft_config
from ..config.shares import parse_share
from ..engine.processes import num_processes
from ..engine.sharding import check_sharding
from .conversations import PlannedRows, data_certificate, hold_out, plan_rows, verify_rows

FILES_PER_WORKER = 64  # open at once, for batches that were read ahead


@dataclass(frozen=True)
class PreparedData:
    """What the checks found: rows, planned and proven."""

    data: PlannedRows
    replay: PlannedRows
    certificates: list[dict[str, Any]]
    held_out: PlannedRows = field(default_factory=PlannedRows)
    """Rows that are measured by while training."""
    more: tuple[PlannedRows, ...] = ()
    """Rows of --more-data, in its order."""
    shares: tuple[float, ...] = ()
    """How often the rows of each are seen in a pass over the data."""

    @property
    def groups(self) -> tuple[PlannedRows, ...]:
        """All that is trained on, in the order that the sampler numbers rows in."""
        return (self.data, self.replay, *self.more)

    @property
    def seen_of_more(self) -> tuple[tuple[int, int], ...]:
        """Rows of each of `more`, and how many of them a pass takes."""
        return tuple(
            (len(rows), max(1, round(share * len(rows)))) for rows, share in zip(self.more, self.shares, strict=True)
        )


def check_adapter(config: InstructConfig) -> None:
    """Raises UserError for an adapter that is for diffusion models alone."""
    variant = REGISTRY.get(config.adapter)
    if variant is not None and variant.follows_noise:
        raise UserError(
            f"--adapter {config.adapter} goes by how noisy an image is while it is made, and a vision-language model makes none: take "
            "another, such as moslora."
        )


def prepare_instruct(config: InstructConfig) -> tuple[InstructConfig, tuple[Any, ...]]:
    """Checks the settings and reads the data; no model is loaded, only its processor."""
    check_adapter(config)
    peft_config(config, config.target_modules or ("q_proj",))
    check_sharding(config, num_processes())
    if config.train_projector and "projector" in config.target_parts:
        raise UserError(
            "--train-projector and --target-parts projector both change the projector: leave one of them out."
        )
    check_rates(config)
    if (config.keep == "best" or config.patience) and not config.evaluate_every:
        raise UserError(
            "--keep best and --patience need measurements: say with --evaluate-every after how many steps each."
        )
    return prepare_conversations(config)


def check_rates(config: InstructConfig) -> None:
    """Raises UserError for settings of a part that is not trained."""
    if config.target_modules:
        return
    tower = any(part.startswith("vision-") for part in config.target_parts)
    projector = config.train_projector or "projector" in config.target_parts
    for name, trained in (
        ("vision_learning_rate", tower),
        ("vision_alpha", tower),
        ("projector_learning_rate", projector),
    ):
        if getattr(config, name) is not None and not trained:
            raise UserError(
                f"{as_flag(name)} is of a part that is not trained: add it to --target-parts, or leave the setting out."
            )


def prepare_conversations(config: Any) -> tuple[Any, tuple[Any, ...]]:
    """The config with its number of steps; the data and the base's folder."""
    if config.data is None:
        raise UserError("--data is missing: give a file with conversations about images.")
    base = resolve_vision_base(config.base)
    check_attention(config.attention)
    check_workers(config.workers)
    vision = VisionLanguageModel(base, **processor_options(config))
    chat, family = vision.chat, vision.family
    planned, certificates = [], []
    for file in (config.data, config.replay):
        rows = plan_rows(file, config, chat) if file else PlannedRows()
        if file:
            check_left_out(file, rows, config)
            certificates.append(data_certificate(file, rows, chat, verify_rows(rows, chat)))
        planned.append(rows)
    if config.packing and not family.supports_packing:
        raise UserError(
            f"--packing does not work with {config.base}: in its attention the questions of packed rows would see one another."
        )
    more, shares = [], []
    for name in config.more_data:
        file, share = parse_share(name)
        rows = plan_rows(file, config, chat)
        check_left_out(file, rows, config)
        certificates.append(data_certificate(file, rows, chat, verify_rows(rows, chat)) | {"share": share})
        more.append(rows)
        shares.append(share)
    learned, held_out = measured_rows(planned[0], config, chat)
    found = PreparedData(learned, planned[1], certificates, held_out, tuple(more), tuple(shares))
    if config.epochs is not None:
        window = config.batch_size * config.gradient_accumulation
        config = replace(config, steps=max(1, math.ceil(config.epochs * rows_per_epoch(config, found) / window)))
    return config, (found, base)


def check_workers(workers: int) -> None:
    """Raises UserError when fewer files may be open than workers need, who pass each tensor as one."""
    files = max_open_files()
    if workers and files < FILES_PER_WORKER * (workers + 1):
        raise UserError(
            f"--workers {workers} need more open files than the {files} that this shell allows: raise it with `ulimit -n 4096`, or "
            "take --workers 0."
        )


def measured_rows(planned: PlannedRows, config: Any, chat: ChatTokens) -> tuple[PlannedRows, PlannedRows]:
    """The rows to learn from, and those to measure by."""
    if not getattr(config, "evaluate_every", 0):
        return planned, PlannedRows()
    if config.evaluate_data is not None:
        return planned, plan_rows(config.evaluate_data, config, chat)
    learned, held_out = hold_out(planned, config.seed)
    learned = replace(
        learned,
        too_long=planned.too_long,
        longest=planned.longest,
        truncated=planned.truncated,
        faults=planned.faults,
        unused=planned.unused,
        notes=planned.notes,
        split=planned.split,
    )
    return learned, held_out


def processor_options(config: ConversationConfig) -> dict[str, Any]:
    """What the settings change in a base's processor."""
    return {
        "template": read_chat_template(config),
        "pad_to_square": config.pad_to_square,
        "max_pixels": config.max_pixels,
        "min_pixels": config.min_pixels,
        "video_frames": config.video_frames,
    }


def check_left_out(file: Any, rows: PlannedRows, config: ConversationConfig) -> None:
    """Raises UserError when more of the data is left out than may be."""
    if rows.left_out_share > config.max_left_out:
        lines = "; ".join(rows.describe_left_out(config.max_length))
        raise UserError(
            f"{file}: {rows.left_out_share:.0%} of the rows would be left out, more than --max-left-out {config.max_left_out:g} allows: "
            f"{lines}."
        )


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
    return len(found.data) + num_replayed(config, found) + sum(seen for _, seen in found.seen_of_more)


def open_without_weights(config: InstructConfig, folder: str) -> VisionLanguageModel:
    """The base's real architecture, frozen and without numbers (torch's meta device)."""
    dtype = DTYPES[config.precision]
    vision = VisionLanguageModel(folder, dtype, "meta", **processor_options(config))
    with torch.device("meta"):
        vision._model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).to(dtype)
    vision.model.requires_grad_(False)
    return vision
