"""What is probably not meant, said before a run begins; it begins all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...toolkit.data.subjects import Sample, folders_below, unreadable_images
from ..config.base import LoopConfig
from ..config.compose import ComposeConfig
from ..config.images import DiffusionConfig
from ..config.instruct import ConversationConfig
from ..engine.optimizer import optimizer_notice


def notices(config: LoopConfig, inputs: tuple[Any, ...]) -> list[str]:
    """Sentences about settings and data. inputs: what the method's checks found."""
    found = [optimizer_notice(config)]
    if isinstance(config, DiffusionConfig) and not isinstance(config, ComposeConfig):
        found.append(token_notice(config, inputs[0]))
        for folder in sorted({sample.path.parent for sample in inputs[0]}):
            found += folder_notices(config, folder)
    if isinstance(config, ConversationConfig):
        found += data_notices(config, inputs[0])
    return [text for text in found if text]


def data_notices(config: ConversationConfig, data: Any) -> list[str]:
    """What is learned from conversations and what is left out, as `inspect` says it."""
    found = []
    measured = getattr(config, "evaluate_data", None) or config.data
    more = [(name.rpartition("=")[0] or name, rows) for name, rows in zip(config.more_data, data.more, strict=True)]
    own = ((config.data, data.data), (config.replay, data.replay), (f"{measured}, held out", data.held_out))
    for file, rows in (*own, *more):
        if file is not None and len(rows):
            found.append("\n  ".join([str(file), *rows.describe(config.max_length)]))
    return found


def folder_notices(config: DiffusionConfig, folder: Path) -> list[str]:
    """What a folder of images holds that is not used."""
    found = []
    if names := unreadable_images(folder):
        found.append(f"Not used, since they cannot be read: {', '.join(names)} in {folder}. Save them as JPEG or PNG.")
    named = {Path(value).resolve() for value in vars(config).values() if isinstance(value, (str, Path)) and value}
    if below := [path.name for path in folders_below(folder) if path.resolve() not in named]:
        found.append(f"Not looked into: the folders with images in {folder}: {', '.join(below)}.")
    return found


def token_notice(config: DiffusionConfig, samples: list[Sample]) -> str:
    """Whether every image has a caption, and none of them says a subject's token; '' if not."""
    captions = [sample.caption for sample in samples]
    if not all(captions) or any(token in (caption or "") for token in config.subjects for caption in captions):
        return ""
    return (
        f"No caption says {config.token}, so the adapter will not answer to it: put it into the captions, or give with --token a word that "
        "they have in common."
    )
