"""Every file and folder that a run's settings name, checked."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ....toolkit.data.conversations import read_conversations
from ....toolkit.data.subjects import ALPHA, find_samples
from ....toolkit.data.videos import medium_parts
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.base import LoopConfig
from ....training.config.instruct import ConversationConfig
from ....training.config.shares import split_share
from ....training.config.subject import NO_PROMPTS, SubjectConfig
from ....training.runs.begin import SOURCES
from .comparison import parse_clip_model
from .paths import StudioPaths

BY_NAME = ("base", "preview_base", "evaluate_prompts")  # which may say something else than a path


def check_paths(config: LoopConfig, paths: StudioPaths, name: str) -> LoopConfig:
    """The config with the run's folder set, if all its paths may be read.

    Raises:
        UserError: for a path outside what the studio may read.
    """
    values: dict[str, Any] = {"out": paths.new_run(name)}
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    for key in SOURCES:
        given = getattr(config, key, None) if key in known and key not in BY_NAME else None
        if isinstance(given, tuple):
            values[key] = tuple(paths.readable_path(str(one), f"The path of {key}") for one in given)
        elif given and not (key == "masks" and given == ALPHA):
            values[key] = type(given)(paths.readable_path(str(given), f"The path of {key}"))
    if more := getattr(config, "more_data", ()):
        values["more_data"] = tuple(
            str(paths.readable_path(name, "The path of more_data")) + share for name, share in map(split_share, more)
        )
    if clip := getattr(config, "evaluate_clip", ""):
        values["evaluate_clip"] = parse_clip_model(paths, "", clip)
    embedded = EMBEDDED_VISION if isinstance(config, ConversationConfig) else EMBEDDED
    values["base"] = paths.base(getattr(config, "base", ""), tuple(embedded))
    if isinstance(config, SubjectConfig):
        values["preview_base"] = config.preview_base and paths.base(config.preview_base, tuple(embedded))
        values["also"] = {
            key: str(paths.readable_folder(text, "The folder of also")) for key, text in config.also.items()
        }
        check_references(config, paths)
        if config.evaluate_prompts and config.evaluate_prompts not in ("object", "live", "world", NO_PROMPTS):
            values["evaluate_prompts"] = str(paths.readable_path(config.evaluate_prompts, "The prompts"))
    return replace(config, **values)  # type: ignore[type-var]


def check_references(config: SubjectConfig, paths: StudioPaths) -> None:
    """Raises UserError when a table beside the images names a reference outside what the studio may read."""
    for sample in find_samples(config.images, skip_bad=True) if config.images else ():
        for path in sample.references:
            paths.readable_path(str(path), f"The reference of {sample.path.name}")


def check_media(config: Any, paths: StudioPaths) -> None:
    """Raises UserError when a row of the data names an image or video outside what the studio may read."""
    more = [Path(name) for name, _ in map(split_share, config.more_data)]
    for file in [file for file in (config.data, *more, config.replay, config.evaluate_data) if file is not None]:
        found = read_conversations(
            file, config.images, skip_bad=config.skip_bad, columns=config.columns, split=config.split
        )
        parts = {part for row in found.rows for medium in row.images for part in medium_parts(medium)}
        for part in parts:
            if isinstance(part, Path):
                paths.readable_path(str(part), f"{file.name}: the image")
