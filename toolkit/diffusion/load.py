"""Base models for image generation: found, and checked before anything of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..core.cache import cache_key
from ..core.errors import UserError, did_you_mean
from ..core.hub import WEIGHTS, fetch_snapshot
from ..core.locks import acquire, release
from ..core.paths import assets_folder, cache_folder, is_file, is_hub_id
from ..core.records import read_record
from .base_files import BaseFiles, parse_base
from .families import FAMILIES
from .formulation import check_formulation
from .model import DiffusionModel, has_weights, is_part
from .part_files import scale_names
from .single_file import SUFFIXES, convert

LONGEST_CONVERSION = 3600.0  # seconds that a process waits for another one that converts the same files
EMBEDDED = {"tiny": "tiny/sd", "tiny-dit": "tiny/dit", "tiny-turbo": "tiny/turbo", "tiny-kontext": "tiny/kontext"}


def resolve_base(base: str) -> str:
    """The folder or hub id behind --base, checked as far as possible without loading a weight.

    Raises:
        UserError: for a folder that is not a pipeline, or a hub id that can be neither found in the cache nor fetched.
    """
    base = str(base)  # somebody's Path, too
    if base in EMBEDDED:
        folder = assets_folder() / EMBEDDED[base]
        if not (folder / "model_index.json").is_file():
            raise UserError(f"The embedded model is missing from {folder}; build it with: rankfold build-tiny")
        return str(folder)
    if (files := parse_base(base)) is not None:
        return str(convert_files(check_files(files)))
    if Path(base).is_dir():
        check_pipeline_folder(Path(base))
        return base
    if Path(base).is_file() and Path(base).suffix in SUFFIXES:
        return str(convert_files(BaseFiles(base)))
    if base.endswith(".gguf"):
        raise UserError(
            f"--base {base}: GGUF files are not read; take a .safetensors file of the same model in bf16, fp16 or fp8."
        )
    if Path(base).exists() or not is_hub_id(base):
        raise UserError(
            f"--base {base} is neither a pipeline folder, nor a checkpoint ({', '.join(SUFFIXES)}), nor a hub id (name/model). "
            f"The embedded models are {', '.join(EMBEDDED)}."
        )
    cure = "Check the network and the spelling, give a local folder, or use the embedded model: --base tiny"
    folder = fetch_snapshot(base, WEIGHTS, f"--base {base}", cure)
    if not any(Path(folder).glob("*/*.safetensors")):  # a repository that has the fp16 variant only
        folder = fetch_snapshot(base, WEIGHTS, f"--base {base}", cure, ignore=())
    check_pipeline_folder(Path(folder))
    return folder


def check_pipeline_folder(folder: Path) -> None:
    """Raises UserError when the folder is not a complete pipeline of a family that can be trained."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--base {folder} is not a diffusers pipeline: it has no model_index.json.")
    parts = read_record(index) or {}
    kind = parts.get("_class_name")
    if not isinstance(kind, str):
        raise UserError(f"--base {folder}: model_index.json names no pipeline class.")
    family = find_family(kind)
    if family is None:
        known = [name for one in FAMILIES for name in one.pipelines]
        raise UserError(
            f"--base {folder} is a {kind}, which cannot be trained yet.{did_you_mean(kind, known)} Known are {', '.join(known)}; a "
            "new family is one small file in toolkit/diffusion/families (see docs/families.md)."
        )
    needed = [family.denoiser_name, "vae", "scheduler"]
    named = {*needed, *family.text_encoder_names} & parts.keys()
    for name, value in parts.items():
        setting = isinstance(value, list) and bool(value) and all(isinstance(one, int | float) for one in value)
        if isinstance(value, list) and not is_part(value) and (name in named or not setting):
            raise UserError(
                f"--base {folder}: model_index.json says of {name} {value!r}, where library and class should be."
            )
    needed += [
        name
        for name, value in parts.items()
        if name.startswith(("text_encoder", "tokenizer")) and is_part(value) and value[0]
    ]
    for part in needed:
        if not (folder / part).is_dir():
            raise UserError(f"--base {folder} is incomplete: the folder {part}/ is missing.")
    for part in sorted({family.denoiser_name, "vae", *family.text_encoder_names} & set(needed)):
        if not has_weights(folder / part):
            raise UserError(f"--base {folder} is incomplete: {part}/ holds no weights (.safetensors or .bin).")
        check_scales(folder, part)
    check_formulation(family, folder)


def check_scales(folder: Path, part: str) -> None:
    """Raises UserError for quantised weights in a part whose config names nobody who would multiply them by their scales."""
    if "quantization_config" in (read_record(folder / part / "config.json") or {}):
        return
    for file in sorted((folder / part).glob("*.safetensors")):
        if name := next(scale_names(file), ""):
            option = {"vae": "--vae"}.get(part, "--text-encoder" if part.startswith("text_encoder") else "--base")
            raise UserError(
                f"--base {folder}: {part}/{file.name} holds quantised weights with scales ({name}), which the loader of a folder "
                f"overlooks: give that file by {option} and the folder by --layout, so that they are dequantised."
            )


def check_files(files: BaseFiles) -> BaseFiles:
    """The files of a base, if they are there.

    Raises:
        UserError: naming the option and the cure.
    """
    options = ["--base", *(["--vae"] if files.vae else []), *["--text-encoder"] * len(files.text_encoders)]
    for option, file in zip(options, files.files, strict=True):
        if not is_file(file) or file.suffix not in SUFFIXES:
            beside = " (where --vae, --text-encoder or --layout are given)" if option == "--base" else ""
            raise UserError(
                f"{option} {file} is no file with weights ({', '.join(SUFFIXES)}){beside}: give the file, or leave the option out."
            )
    return files


def convert_files(files: BaseFiles) -> Path:
    """The pipeline folder of a base in files, made when they are used for the first time."""
    file, *others = files.files
    facts = [(str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in files.files]
    own = {"file": facts[0][0], "size": facts[0][1], "changed": facts[0][2]}
    layout = Path(files.layout)
    configs = [*layout.glob("*.json"), *layout.glob("*/*.json")] if files.layout and layout.is_dir() else []
    if others or files.layout:
        seen = [(str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in sorted(configs)]
        own |= {"others": facts[1:], "vae": bool(files.vae), "layout": files.layout, "configs": seen}
    key = cache_key(**own)
    folder = cache_folder() / "bases" / f"{file.stem}-{key[:12]}"
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        acquire(lock, wait=LONGEST_CONVERSION)  # of several processes, the first converts
        try:
            if not (folder / "model_index.json").is_file():
                more = f" and {len(others)} more files are" if others else " is"
                print(f"{file}{more} turned into a pipeline folder once: {folder}")
                given = {
                    "vae": Path(files.vae) if files.vae else None,
                    "text_encoders": tuple(map(Path, files.text_encoders)),
                }
                convert(file, files.layout or None, folder, **(given if others else {}))
        finally:
            release(lock)
    check_pipeline_folder(folder)
    return folder


def find_family(pipeline: str) -> type[DiffusionModel] | None:
    """The family of a pipeline class."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def open_model(
    path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", quantize: str = "none"
) -> DiffusionModel:
    """The base model in a folder that `resolve_base` gave; nothing of it is loaded yet."""
    family = find_family(json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    assert family is not None, "resolve_base refuses pipelines of no family"
    return family(path, dtype, device, quantize)
