"""An adapter as files for other tools, proven, and named after its run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ....pipelines.export import export_adapter
from ....pipelines.export_chat import export_chat
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED
from ....toolkit.formats.adapter_folder import is_native
from ....toolkit.formats.write import FORMATS
from ....toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ....training.config.images import DiffusionConfig
from .adapter_list import AdapterEntry, find_adapter
from .paths import StudioPaths

EXPORTS_FOLDER = "_exports"  # in the runs' folder: what was exported


def require_base(paths: StudioPaths, one: AdapterEntry) -> str:
    """The base that an adapter was made for.

    Raises:
        UserError: when it does not say, or the base may not be read.
    """
    base = one.facts.base
    if not base:
        raise UserError(f"{one.name} does not say which base it was made for, so nothing can be set against it.")
    paths.base(base, tuple(EMBEDDED_VISION if one.is_chat else EMBEDDED))
    return base


def export_files(
    paths: StudioPaths, name: str | None, format: str, *, approximate: bool, max_error: float, drop_bias: bool
) -> tuple[list[str], list[str]]:
    """Writes an adapter for other tools below the runs' folder; returns the proof's sentences and the files.

    Raises:
        UserError: for an unknown adapter or format, one that the format cannot say, and a file that proves to be wrong.
    """
    one = find_adapter(paths, name)
    if format not in FORMATS:
        raise UserError(f"{format!r} is not a format: choose one of {', '.join(FORMATS)}.")
    if approximate and not 0 < max_error <= 1:
        raise UserError(f"The error of a layer must be in (0, 1], not {max_error:g}.")
    if not is_native(one.path):
        raise UserError(f"{one.name} is a file of another tool already: take it from {one.path}.")
    base, out = require_base(paths, one), paths.runs / EXPORTS_FOLDER / folder_name(one.name)
    if one.is_chat:
        if format != "peft":
            raise UserError(f"{one.name} is an adapter of a vision-language model: choose the format peft.")
        proof = export_chat(one.path, base, format, out)
        proof.check()
        return proof.summary(), [zip_folder(proof.path, out)]
    prompt, width = proof_settings(paths, one)
    error = max_error if approximate else None
    proof = export_adapter(
        one.path, base, format, out, prompt=prompt, max_error=error, drop_bias=drop_bias, width=width
    )
    proof.check()
    files = [zip_folder(proof.path, out) if proof.path.is_dir() else name_after(proof.path, out, format)]
    return proof.summary(), files + [str(word) for word in proof.token_files]


def proof_settings(paths: StudioPaths, one: AdapterEntry) -> tuple[str, int]:
    """Prompt and width of the images that a file is proven with: those of the run, where there is one."""
    config = paths.config(one.run) if one.run else None
    if isinstance(config, DiffusionConfig):
        return config.prompt, config.resolution
    return f"a {one.trigger or 'creature'}", 0


def folder_name(name: str) -> str:
    """A page's name of an adapter as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def zip_folder(folder: Path, out: Path) -> str:
    """A folder as one file to download."""
    name = out / f"{out.name}-{folder.name}"
    return shutil.make_archive(str(name), "zip", root_dir=folder.parent, base_dir=folder.name)


def name_after(file: Path, out: Path, format: str) -> str:
    """The file, named after the adapter, so that downloads of several can be told apart."""
    named = out / (f"{out.name}.safetensors" if format == "diffusers" else f"{out.name}-{format}.safetensors")
    return str(file.replace(named))
