"""What is probably not meant, said before a run begins; it begins all the same."""

from __future__ import annotations

from typing import Any

from ...toolkit.data.subjects import Sample, unreadable_images
from ..config.base import LoopConfig
from ..config.compose import ComposeConfig
from ..config.images import DiffusionConfig
from ..engine.optimizer import optimizer_notice


def notices(config: LoopConfig, inputs: tuple[Any, ...]) -> list[str]:
    """Sentences about settings and data. inputs: what the method's checks found."""
    found = [optimizer_notice(config)]
    if isinstance(config, DiffusionConfig) and not isinstance(config, ComposeConfig):
        found.append(token_notice(config, inputs[0]))
    folders = {sample.path.parent for sample in inputs[0]} if isinstance(config, DiffusionConfig) else ()
    for folder in sorted(folders):
        if names := unreadable_images(folder):
            found.append(
                f"Not used, since they cannot be read: {', '.join(names)} in {folder}. Save them as JPEG or PNG."
            )
    return [text for text in found if text]


def token_notice(config: DiffusionConfig, samples: list[Sample]) -> str:
    """Whether every image has a caption, and none of them says a subject's token; '' if not."""
    captions = [sample.caption for sample in samples]
    if not all(captions) or any(token in (caption or "") for token in config.subjects for caption in captions):
        return ""
    return (
        f"No caption says {config.token}, so the adapter will not answer to it: put it into the captions, or give with --token a word that "
        "they have in common."
    )
