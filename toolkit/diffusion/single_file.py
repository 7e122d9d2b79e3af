"""Checkpoints in one file (as A1111 and ComfyUI keep them), turned once into a folder in diffusers' layout."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from ..core.hub import CONFIGS, fetch_snapshot
from ..core.paths import is_hub_id
from ..core.systems import retry_while_locked
from .model import UNUSED_PARTS, is_part, weights_variant

SUFFIXES = (".safetensors", ".ckpt")
KEY_PREFIXES = {  # how the names of a part's tensors begin in one file; the denoiser's may begin with anything
    "vae": ("first_stage_model.", "vae."),
    "CLIP": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip"),
    "T5": ("text_encoders.t5xxl.",),
}


def convert(file: Path, layout: str | None, out: Path) -> Path:
    """Writes the checkpoint as a pipeline folder, in the dtype it is in.

    layout: a pipeline folder or hub id of the same architecture, for configs and tokenizers, and for the weights of parts that
    the file does not have (files of transformers mostly hold nothing else). None takes the one that diffusers has for such a file.

    Raises:
        UserError: for a file that is not a checkpoint, or a layout that cannot be had or does not fit.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another folder.")
    state = read_single_file(file)
    folder = layout_folder(file, state, layout)
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_pipeline(file, state, folder, unfinished)
    except (ValueError, RuntimeError, OSError, KeyError, AttributeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{file} does not fit the layout of {layout or folder} ({first}): give --layout a pipeline folder or hub id of its own "
            "architecture."
        ) from error
    if out.is_dir():  # empty; Windows renames onto nothing that is there
        out.rmdir()
    retry_while_locked(lambda: unfinished.replace(out))
    return out


def read_single_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; a pickled one is read without running what is in it."""
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    try:
        state: Any = load_single_file_checkpoint(str(file), local_files_only=True)
    except Exception as error:
        raise UserError(f"{file} cannot be read as a checkpoint ({type(error).__name__}): is it complete?") from error
    return state


def layout_folder(file: Path, state: dict[str, torch.Tensor], layout: str | None) -> Path:
    """A folder with the configs of the checkpoint's pipeline, and with the weights of the parts that the file does not have."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    if layout and Path(layout).is_dir():
        if not (Path(layout) / "model_index.json").is_file():
            raise UserError(f"--layout {layout} is not a diffusers pipeline: it has no model_index.json.")
        return Path(layout)
    if layout and not is_hub_id(layout):
        raise UserError(f"--layout {layout} is neither a folder nor a hub id.")
    name = layout or fetch_diffusers_config(state)["pretrained_model_name_or_path"]
    cure = f"Give others: rankfold convert-base {file} --layout FOLDER_OR_HUB_ID --out FOLDER"
    folder = Path(fetch_snapshot(name, CONFIGS, f"{name}, whose configs and tokenizers {file} needs,", cure))
    if parts := missing_components(state, read_index(folder)):
        weights = [*CONFIGS, *(f"{part}/*.safetensors" for part in parts)]
        folder = Path(fetch_snapshot(name, weights, f"{name}, whose {', '.join(parts)} {file} needs,", cure))
    return folder


def read_index(layout: Path) -> dict[str, Any]:
    """What a pipeline folder says of its parts."""
    return json.loads((layout / "model_index.json").read_text(encoding="utf-8"))


def has_component(state: dict[str, torch.Tensor], kind: str) -> bool:
    """Whether the file has the part of this name, or of a class whose name begins so."""
    return any(name.startswith(KEY_PREFIXES[kind]) for name in state)


def write_pipeline(file: Path, state: dict[str, torch.Tensor], layout: Path, out: Path) -> None:
    """Every part from the file where it is in there, otherwise from the layout.

    Raises:
        ValueError: for a part that is in neither.
    """
    import diffusers
    from diffusers.loaders.single_file import SingleFileComponentError

    index = read_index(layout)
    dtype = Counter(value.dtype for value in state.values()).most_common(1)[0][0]
    try:
        if any(has_component(state, kind) for kind in KEY_PREFIXES):
            kind: Any = getattr(diffusers, index["_class_name"])
            given: dict[str, Any] = {name: None for name in UNUSED_PARTS if name in index}
            for name, own in missing_components(state, index).items():
                given[name] = own.from_pretrained(
                    layout, subfolder=name, dtype=dtype, variant=weights_variant(layout / name)
                )
            pipe = kind.from_single_file(str(file), config=str(layout), dtype=dtype, local_files_only=True, **given)
            parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
            save = lambda: pipe.save_pretrained(out)  # noqa: E731
        else:
            name = "unet" if "unet" in index else "transformer"
            kind = getattr(diffusers, index[name][1])
            parts = {name: kind.from_single_file(state, config=str(layout), subfolder=name, dtype=dtype)}
            shutil.copytree(layout, out, ignore=lambda folder, _: [name] if Path(folder) == layout else [])
            save = lambda: parts[name].save_pretrained(out / name)  # noqa: E731
    except SingleFileComponentError as error:
        raise ValueError(str(error)) from error
    for name, part in parts.items():
        if any(parameter.is_meta for parameter in part.parameters()):
            raise ValueError(f"the file does not have the whole {name}")
    save()


def missing_components(state: dict[str, torch.Tensor], index: dict[str, Any]) -> dict[str, Any]:
    """The autoencoder and text encoders that the file does not have: name -> class."""
    found = {}
    for name, value in index.items():
        if not is_part(value) or value[0] is None:
            continue
        kind = next((kind for kind in KEY_PREFIXES if name == kind or value[1].startswith(kind)), None)
        text = name.startswith("text_encoder")
        if (kind and (kind == "vae" or text) and not has_component(state, kind)) or (text and kind is None):
            found[name] = getattr(importlib.import_module(value[0]), value[1])
    return found
