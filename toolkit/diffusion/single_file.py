"""Checkpoints in one file or several (as A1111 and ComfyUI keep them), turned once into a folder in diffusers' layout."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from ..core.hub import CONFIGS, fetch_snapshot
from ..core.paths import is_hub_id
from ..core.systems import retry_while_locked
from .model import UNUSED_PARTS, has_weights, is_part, weights_variant
from .part_files import PartFile, build_part, is_quantized_file, match_files, read_tensors
from .quantized_files import common_dtype

SUFFIXES = (".safetensors", ".ckpt")
KEY_PREFIXES = {  # how the names of a part's tensors begin in one file; the denoiser's may begin with anything
    "vae": ("first_stage_model.", "vae."),
    "CLIP": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip"),
    "T5": ("text_encoders.t5xxl.",),
}


def convert(
    file: Path, layout: str | None, out: Path, vae: Path | None = None, text_encoders: Sequence[Path] = ()
) -> Path:
    """Writes the checkpoint as a pipeline folder, in the dtype it is in; quantised weights as floating point.

    vae and text_encoders: files of parts that `file` does not have, or that replace those it has.

    layout: a pipeline folder or hub id of the same architecture, for configs and tokenizers, and for the weights of parts that
    the file does not have (files of transformers mostly hold nothing else). None takes the one that diffusers has for such a file.

    Raises:
        UserError: for a file that is not a checkpoint, or a layout that cannot be had or does not fit.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another folder.")
    state = read_single_file(file)
    given: list[PartFile] = []
    if vae or text_encoders:
        folder = layout_folder(file, state, layout, lambda folder: match_files(vae, text_encoders, folder, given))
    else:
        folder = layout_folder(file, state, layout)
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_pipeline(file, state, folder, unfinished, given)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
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
    """The tensors of a checkpoint."""
    return read_tensors(file)


def layout_folder(
    file: Path,
    state: dict[str, torch.Tensor],
    layout: str | None,
    find_given: Callable[[Path], Sequence[PartFile]] = lambda folder: (),
) -> Path:
    """A folder with the configs of the checkpoint's pipeline, and with the weights of the parts that no file has.

    find_given: from the folder with the configs, the parts that have a file of their own.

    Raises:
        UserError: for a layout that cannot be had, or whose folder has not the weights either.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    cure = (
        f"Give another: --layout FOLDER_OR_HUB_ID, beside --base {file} or after `rankfold convert-base {file}`, names a pipeline folder "
        "whose configs and tokenizers are used"
    )
    if layout and Path(layout).is_dir():
        if not (Path(layout) / "model_index.json").is_file():
            raise UserError(f"--layout {layout} is not a diffusers pipeline: it has no model_index.json.")
        folder, name = Path(layout), None
    elif layout and not is_hub_id(layout):
        raise UserError(f"--layout {layout} is neither a folder nor a hub id.")
    else:
        name = layout or fetch_diffusers_config(state)["pretrained_model_name_or_path"]
        folder = Path(fetch_snapshot(name, CONFIGS, f"{name}, whose configs and tokenizers {file} needs,", f"{cure}."))
    own = {part.name for part in find_given(folder)}  # which their configs tell
    parts = [part for part in missing_components(state, read_index(folder)) if part not in own]
    if name is None:
        lacking = [part for part in parts if not ((folder / part).is_dir() and has_weights(folder / part))]
        if lacking:
            index = read_index(folder)
            named = ", ".join(f"{part} ({index[part][1]})" for part in lacking)
            raise UserError(
                f"{file} has no {named}, and --layout {layout} holds no such weights: name files with --vae and --text-encoder, or a "
                "--layout that has them."
            )
    elif parts:
        weights = [*CONFIGS, *(f"{part}/*.safetensors" for part in parts)]
        cure += ", and --vae and --text-encoder name files with the weights."
        folder = Path(fetch_snapshot(name, weights, f"{name}, whose {', '.join(parts)} {file} needs,", cure))
    return folder


def read_index(layout: Path) -> dict[str, Any]:
    """What a pipeline folder says of its parts."""
    return json.loads((layout / "model_index.json").read_text(encoding="utf-8"))


def has_component(state: dict[str, torch.Tensor], kind: str) -> bool:
    """Whether the file has the part of this name, or of a class whose name begins so."""
    return any(name.startswith(KEY_PREFIXES[kind]) for name in state)


def write_pipeline(
    file: Path, state: dict[str, torch.Tensor], layout: Path, out: Path, given: Sequence[PartFile] = ()
) -> None:
    """Every part from a file where it is in one, otherwise from the layout.

    Raises:
        ValueError: for a part that is in neither.
    """
    index = read_index(layout)
    parts = {part.name: build_part(part, index, layout) for part in given}
    if any(has_component(state, kind) for kind in KEY_PREFIXES):
        write_checkpoint(file, state, layout, out, parts)
        return
    name = "unet" if "unet" in index else "transformer"
    parts[name] = build_part(PartFile(name, file, state), index, layout)
    shutil.copytree(layout, out, ignore=lambda folder, _: list(parts) if Path(folder) == layout else [])
    for name, part in parts.items():
        part.save_pretrained(out / name)  # type: ignore[operator]


def write_checkpoint(
    file: Path, state: dict[str, torch.Tensor], layout: Path, out: Path, given: dict[str, nn.Module]
) -> None:
    """A checkpoint that holds more than the denoiser, by the stock pipeline's from_single_file. given: parts of other files.

    Raises:
        ValueError: for a part that it has not whole.
    """
    import diffusers
    from diffusers.loaders.single_file import SingleFileComponentError
    from safetensors.torch import save_file

    index, dtype = read_index(layout), common_dtype(state)
    kind: Any = getattr(diffusers, index["_class_name"])
    others: dict[str, Any] = {name: None for name in UNUSED_PARTS if name in index} | given
    for name, own in missing_components(state, index).items():
        if name not in given:
            others[name] = own.from_pretrained(
                layout, subfolder=name, dtype=dtype, variant=weights_variant(layout / name)
            )
    source = file
    if is_quantized_file(file):  # the pipeline reads files only
        out.mkdir(parents=True, exist_ok=True)
        source = out / "dequantized.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, source)
    try:
        pipe = kind.from_single_file(str(source), config=str(layout), dtype=dtype, local_files_only=True, **others)
    except SingleFileComponentError as error:
        raise ValueError(str(error)) from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            raise ValueError(f"the file does not have the whole {name}")
    pipe.save_pretrained(out)
    if source != file:
        source.unlink()


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
