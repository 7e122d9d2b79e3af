"""What a run will see and what is probably not meant, said before it begins; it begins all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...toolkit.core.devices import device_type, has_own_memory
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.diffusion.load import open_model
from ..config.base import LoopConfig
from ..config.defaults import describe_settings
from ..config.images import DiffusionConfig
from ..config.instruct import ConversationConfig
from ..config.shares import split_share
from ..config.subject import SubjectConfig
from ..config.unused import unused_settings
from ..engine.optimizer import optimizer_notice
from ..subject.held_out import split_measured_photos
from ..subject.summary import ImageSummary, summarize_images


def announce(config: LoopConfig, inputs: tuple[Any, ...], run: Run) -> None:
    """Prints the summary and the notices, and keeps them in the run's log and in its summary.json. inputs: of the method's checks."""
    summary = summarize(config, inputs)
    lines = [f"settings  {describe_settings(config)}", *(summary.lines() if summary else []), *notices(config, summary)]
    lines += [] if run.folds() else unused_settings(config)  # the folds were measured with the settings of measuring
    if isinstance(config, ConversationConfig):
        lines += data_notices(config, inputs[0])
    for text in lines:
        print(text, flush=True)
        run.append_log(text)
    if summary is not None:
        write_text(run.folder / "summary.json", json.dumps(summary.to_json(), indent=1, ensure_ascii=False))


def summarize(config: LoopConfig, inputs: tuple[Any, ...]) -> ImageSummary | None:
    """What a training on images sees; None for other methods."""
    if not isinstance(config, DiffusionConfig):
        return None
    samples, *_, base = inputs
    held_out: list[Path] = []
    if isinstance(config, SubjectConfig):
        samples, held_out = split_measured_photos(config, samples)
    summary = summarize_images(config, samples, open_model(base))
    return replace(summary, held_out=[path.name for path in held_out])


def notices(config: LoopConfig, summary: ImageSummary | None) -> list[str]:
    """Sentences about settings and data."""
    found = [optimizer_notice(config), swap_notice(config), *(summary.warnings if summary else [])]
    return [text for text in found if text]


def swap_notice(config: LoopConfig) -> str:
    """What to know where blocks are swapped and no memory is saved by it."""
    if getattr(config, "blocks_to_swap", 0) and not has_own_memory(kind := device_type()):
        return f"--blocks-to-swap saves memory of a GPU only: {kind} has none of its own, and blocks are copied within main memory."
    return ""


def data_notices(config: ConversationConfig, data: Any) -> list[str]:
    """What is learned from conversations and what is left out, as `inspect` says it."""
    found = []
    measured = getattr(config, "evaluate_data", None) or config.data
    more = [(split_share(name)[0], rows) for name, rows in zip(config.more_data, data.more, strict=True)]
    own = ((config.data, data.data), (config.replay, data.replay), (f"{measured}, held out", data.held_out))
    for file, rows in (*own, *more):
        if file is not None and len(rows):
            found.append("\n  ".join([str(file), *rows.describe(config.max_length)]))
    return found
