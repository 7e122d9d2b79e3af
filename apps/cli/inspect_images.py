"""`rankfold inspect FOLDER`: what a training would see of a folder of images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ...toolkit.core.errors import UserError
from ...toolkit.formats.adapter_facts import FILE


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder of images, or of kohya's folders of them, and neither a run nor an adapter."""
    from ...toolkit.data.image_folder import REPEATS, folders_below, has_any_image

    if not path.is_dir() or any((path / name).exists() for name in ("config.yaml", FILE, "adapter_config.json")):
        return False
    kohya = any(REPEATS.fullmatch(folder.name) for folder in folders_below(path))
    return kohya or (has_any_image(path) and not holds_conversations(path))


def holds_conversations(folder: Path) -> bool:
    """Whether a folder's table of images, or a file beside it, has questions or messages instead of captions."""
    from ...toolkit.data.captions import TABLES, caption_of, rows_of

    if any(folder.glob("*.parquet")):
        return True
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    first = (next((row for _, row in rows_of(table)), None) for table in tables)
    return any(caption_of(row) is None for row in first)


def inspect_images(folder: Path, base: str, *, token: str | None, skip_bad: bool, as_json: bool) -> None:
    """Prints the summary of a folder, with the settings of `rankfold train subject` where nothing else is said."""
    from ...toolkit.data.subjects import find_samples
    from ...toolkit.diffusion.load import open_model, resolve_base
    from ...training.config.defaults import resolve_defaults
    from ...training.config.subject import SubjectConfig
    from ...training.subject.summary import summarize_images

    config = SubjectConfig(images=folder, base=base, skip_bad=skip_bad)
    if token is not None:
        if not token.strip():
            raise UserError("--token is empty: give the word that stands for the subject, such as sks.")
        config = replace(config, token=token)
    config = resolve_defaults(config)
    samples = find_samples(folder, skip_bad=skip_bad)
    summary = summarize_images(config, samples, open_model(resolve_base(base)))
    if as_json:
        print(json.dumps(summary.to_json(), indent=1, ensure_ascii=False))
        return
    print(*summary.lines(), *(f"! {text}" for text in summary.warnings), sep="\n")
