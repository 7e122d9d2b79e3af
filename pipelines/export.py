"""Export, proven: an adapter leaves in a format of other tools, is loaded back, and is compared.

What the format can say exactly is exact. The rest is approximated when asked for, and its errors are measured, printed and
written into the file's header.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from ..toolkit.adapters.approximate import linearize, low_rank_all
from ..toolkit.adapters.fold import Folded, fold
from ..toolkit.core.errors import UserError
from ..toolkit.core.files import check_replaceable
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.core.run_folder import delete_tree
from ..toolkit.diffusion.load import open_model, resolve_base
from ..toolkit.diffusion.model import DTYPES, DiffusionModel
from ..toolkit.diffusion.textual_inversion import export_token_embeddings, import_token_embeddings
from ..toolkit.formats.adapter_facts import AdapterFacts
from ..toolkit.formats.adapter_folder import PARTS, check_adapter_folder, is_native
from ..toolkit.formats.apply import apply_to_pipeline
from ..toolkit.formats.as_folder import adapter_folder
from ..toolkit.formats.factors import FACTOR_FORMATS, adapter_files, factors_state, write_factors
from ..toolkit.formats.locate import adapter_facts
from ..toolkit.formats.read import read_lora
from ..toolkit.formats.scales import CONFIG_KEY, HEADER_ALPHAS
from ..toolkit.formats.write import (
    FORMATS,
    LOW_RANK,
    Part,
    add_to_header,
    check_format,
    check_representable,
    drop_biases,
    write_lora,
)
from .generate import Recipe, adapter_precision, denoise, load_pipeline, native_resolution, pipeline_family
from .proof import Proof, compare_images, compare_weights

ADAPTER = "adapter_0"
STEPS = 8  # of the images that are compared, and of those that an approximation is fitted to
FITTED_TO = (
    "{} on the beach",
    "{} in the snow at night",
    "a drawing of {}",
)  # prompts; the errors are those of the prompt alone
GUIDANCE = 4.0
FLUX_WIDTH = 3072
KOHYA_READERS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@oom_context("exporting the adapter")
def export_adapter(
    folder: Path,
    base: str,
    format: str,
    out: Path,
    *,
    prompt: str = "a sks creature",
    max_error: float | None = None,
    drop_bias: bool = False,
    width: int = 0,
    precision: str | None = None,
    title: str = "",
    thumbnail: Path | None = None,
    ignore_unused: bool = False,
) -> Proof:
    """Writes the adapter of `folder`, or a LoRA file of any origin, in `format` and proves the file through the reader's own loader.

    out: a folder, or the file itself (.safetensors). Only what was proven gets there; a file or folder of that name is replaced.
    max_error: approximate what the format cannot represent exactly, each layer to this relative error where that can be chosen;
    None refuses instead. drop_bias: Skip bias changes. width: of the images that are compared, pixels; 0 means the
    base model's own. precision: dtype of the base in the proof, unset the adapter's own; the file
    itself is always fp32. title, thumbnail: for the file's header.

    Raises:
        UserError: for an unknown format, a missing adapter, or an adapter that the format cannot represent exactly.
    """
    check_format(format)
    final = final_path(out, format)
    family = open_model(resolve_base(base))
    if is_native(folder):
        check_parts(family, format, check_adapter_folder(folder))
    precision = precision or adapter_precision([str(folder)])
    facts = exported_facts(folder)
    fresh = load_pipeline(Recipe(prompt=prompt, base=base, precision=precision))
    own = adapter_folder(folder, fresh, ignore_unused=ignore_unused)
    check_parts(family, format, check_adapter_folder(own))
    width = width or native_resolution(fresh)
    draw = lambda pipe: draw_image(pipe, prompt, width)  # noqa: E731
    others = [text.format(prompt) for text in FITTED_TO]
    draw_others = lambda pipe: [draw_image(pipe, text, width, seed) for seed, text in enumerate(others, 1)]  # noqa: E731
    live = load_pipeline(Recipe(prompt=prompt, base=base, adapters=(str(own),), strengths=(1.0,), precision=precision))
    parts, errors = exportable_changes(live, format, draw_others, draw, max_error, drop_bias=drop_bias)
    tuned, plain = draw(live), draw(fresh)
    about = {"title": title or final.stem, "thumbnail": thumbnail}
    with staging_folder(final.parent) as beside:
        words = export_token_embeddings(own, beside)
        if format in FACTOR_FORMATS:
            tensors = factors_state(adapter_files(folder, format), fresh, format, family.kohya_prefixes)
            path = write_factors(tensors, parts, format, beside, facts, **about)
        else:
            path = write_lora(parts, format, beside, facts, family.kohya_prefixes, **about)
        for file in words:
            import_token_embeddings(fresh, file)
        proof = replace(
            prove(fresh, path, format, parts, (tuned, plain), draw, DTYPES[precision]),
            path=final,
            token_files=tuple(final.parent / file.name for file in words),
            exact=not errors and not drop_bias,
            approximation=max(errors.values(), default=0.0),
            ranks=rank_range(parts),
            precision=precision,
        )
        if proof.fault():
            return proof  # whoever asked raises it; nothing of the file is kept
        write_proof(path, format, facts, proof)
        publish(path, final)
        for file, place in zip(words, proof.token_files, strict=True):
            publish(file, place)
    return proof


def final_path(out: Path, format: str) -> Path:
    """Where a format's file goes.

    Raises:
        UserError: for a file's name where the format is a folder, or a name of another kind.
    """
    if out.suffix == ".safetensors" and not out.is_dir():
        if format == "peft":
            raise UserError(f"--out {out} is a file, and --format peft writes a folder for each part: give a folder.")
        return out
    if out.is_file():
        raise UserError(f"--out {out} is a file of another kind: give a folder, or a name that ends in .safetensors.")
    return out / FORMATS[format]


@contextmanager
def staging_folder(beside: Path) -> Iterator[Path]:
    """A folder for what is not proven yet, on the disk of the place where it will go; it is gone afterwards.

    Raises:
        UserError: when nothing can be written there.
    """
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=beside, prefix=".rankfold-export-") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"Could not write to {beside}: {error.strerror or error}; choose another --out.") from error


def publish(made: Path, place: Path) -> None:
    """Moves a proven file or folder to its final name; an older one of that name is replaced whole."""
    check_replaceable(place)
    if place.is_dir() and not place.is_symlink():
        delete_tree(place)
    made.replace(place)


def exported_facts(folder: Path) -> AdapterFacts:
    """What an adapter says of itself, but for what is true of its own file alone; the file that is written has its own."""
    facts = adapter_facts(folder)
    other = {
        key: value
        for key, value in facts.other.items()
        if key not in (*HEADER_ALPHAS, CONFIG_KEY, "format")
        and not key.startswith(("ss_network_", "sshs_", "modelspec."))
    }
    return replace(facts, rankfold_proof={}, other=other)


def write_proof(path: Path, format: str, facts: AdapterFacts, proof: Proof) -> None:
    """Puts the proof into the file's header, or beside the folders of peft."""
    said = asdict(proof) | {"path": proof.path.name, "token_files": [file.name for file in proof.token_files]}
    if format == "peft":
        replace(facts, rankfold_proof=said).save(path)
    else:
        add_to_header(path, {"rankfold_proof": json.dumps(said)})


def prove(
    pipe: Any,
    path: Path,
    format: str,
    parts: dict[str, Part],
    images: tuple[np.ndarray, np.ndarray],
    draw: Callable[[Any], np.ndarray],
    dtype: torch.dtype,
) -> Proof:
    """Loads a written file into a pipeline without adapters, and compares. images: made with the adapter, and without."""
    weights = {part: frozen_weights(getattr(pipe, part), parts[part].folded) for part in parts}
    reader, loaded = reload_export(pipe, path, format)
    found = compare_weights({name: part.folded for name, part in parts.items()}, loaded, weights, dtype)
    drawn = compare_images(images[0], draw(pipe), images[1])
    return Proof(
        path, (), reader, True, 0.0, found.largest, drawn.largest, drawn.relative, drawn.effect, found.layers, None,
        relative_error=found.relative, proven_by_reader=reader != "rankfold",
    )  # fmt: skip


def check_parts(family: DiffusionModel, format: str, parts: Sequence[str]) -> None:
    """Raises UserError when the readers of a format have no place for one of the parts."""
    kind = family.index["_class_name"]
    nameless = [part for part in parts if part not in family.kohya_prefixes]
    if format.startswith("comfyui") and kind.startswith("Sana"):
        raise UserError(
            "ComfyUI has no Sana of its own, so no file for it has names there: use --format diffusers or peft."
        )
    if format.startswith("kohya") and nameless:
        raise UserError(
            f"kohya's files name the layers of a {kind}'s {', '.join(nameless)} in another way, which is not written yet: use --format "
            "diffusers or peft."
        )
    deaf = [part for part in parts if part != family.denoiser_name and part not in family.lora_text_encoders]
    if format == "diffusers" and deaf:
        raise UserError(
            f"A stock {kind} reads no LoRA on {', '.join(deaf)}, so one file cannot hold all of this adapter: use --format peft."
        )


# ---------------------------------------------------------------------------------------------- what is written


def exportable_changes(
    pipe: Any,
    format: str,
    draw_others: Callable[[Any], Any],
    draw: Callable[[Any], Any],
    max_error: float | None,
    *,
    drop_bias: bool,
) -> tuple[dict[str, Part], dict[str, float]]:
    """Every adapted part's changes as the format can represent them, and the relative errors of those that are approximated.

    draw_others: draws the images that a linear change is fitted to; draw: those that its error is measured on.
    """
    parts: dict[str, Part] = {}
    errors: dict[str, float] = {}
    for name in PARTS:
        model = getattr(pipe, name, None)
        if ADAPTER not in getattr(model, "peft_config", {}):
            continue
        folded, missed = fold_or_linearize(pipe, model, format, draw_others, draw, max_error)
        if drop_bias:
            folded = drop_biases(folded)
        if format in LOW_RANK and max_error is not None and not all(c.is_low_rank for c in folded.values()):
            folded, cut = low_rank_all(model, folded, max_error)
            missed = {layer: max(missed.get(layer, 0.0), cut[layer]) for layer in folded}
        parts[name] = Part(model, folded, ADAPTER)
        check_representable(parts[name], format)
        errors |= {f"{name}.{layer}": error for layer, error in missed.items()}
    return parts, errors


def fold_or_linearize(
    pipe: Any,
    model: torch.nn.Module,
    format: str,
    draw_others: Callable[[Any], Any],
    draw: Callable[[Any], Any],
    max_error: float | None,
) -> tuple[Folded, dict[str, float]]:
    """The exact fold, or for an adapter that has none, when asked for, its linearisation; see `exportable_changes`.

    Raises:
        UserError: when there is no exact fold and none was asked for.
    """
    try:
        return fold(model, ADAPTER), {}
    except UserError as error:
        if max_error is None:
            raise UserError(f"{error} (--approximate exports the nearest linear one.)") from error
    with_bias = not format.startswith("kohya")
    return linearize(model, lambda: draw_others(pipe), lambda: draw(pipe), ADAPTER, bias=with_bias)


def rank_range(parts: dict[str, Part]) -> tuple[int, int] | None:
    """Least and greatest rank of the factors."""
    ranks = [len(change.down) for part in parts.values() for change in part.folded.values() if change.down is not None]
    return (min(ranks), max(ranks)) if ranks else None


# ---------------------------------------------------------------------------------------------- what is read back


def frozen_weights(model: torch.nn.Module, folded: Folded) -> dict[str, torch.Tensor]:
    """Copies of the weights (out, in * kernel) that will be changed."""
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in folded}
    return {name: weight.detach().float().cpu().reshape(len(weight), -1).clone() for name, weight in weights.items()}


def reload_export(pipe: Any, path: Path, format: str) -> tuple[str, dict[str, Folded]]:
    """Loads an exported file as its readers would; returns the reader's name and the changes it found, by part.

    diffusers reads kohya's files only while they hold no diff_b; what it does not read is put into the weights by lora_read.
    """
    if format == "peft":
        found = {}
        for part in check_adapter_folder(path):
            wrapped = PeftModel.from_pretrained(getattr(pipe, part), str(path / part))
            setattr(pipe, part, wrapped.base_model.model)
            found[part] = fold(getattr(pipe, part), "default")
        return "PEFT", found
    file = read_lora(path)
    plain = format == "kohya" and not any("diff_b" in roles for roles in file.layers.values())
    by_diffusers = format == "diffusers" or (plain and diffusers_reads_kohya(pipe))
    if not by_diffusers:
        return "rankfold", apply_to_pipeline(file, pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="loaded")
    carrying = [part for part in PARTS if "loaded" in getattr(getattr(pipe, part, None), "peft_config", {})]
    return "diffusers", {part: fold(getattr(pipe, part), "loaded") for part in carrying}


def diffusers_reads_kohya(pipe: Any) -> bool:
    """Whether diffusers reads kohya's files for this pipeline: FLUX's only in the width of the released models."""
    kind = type(pipe).__name__
    return kind in KOHYA_READERS or (kind == "FluxPipeline" and pipe.transformer.inner_dim == FLUX_WIDTH)


@torch.no_grad()
def draw_image(pipe: Any, prompt: str, width: int, seed: int = 0) -> np.ndarray:
    """One image, (1, width, width, 3) in 0..1, without rounding to bytes."""
    grey = [Image.new("RGB", (width, width), "grey")] * pipeline_family(pipe).min_references
    return denoise(
        pipe,
        [prompt],
        seeds=[seed],
        steps=STEPS,
        guidance_scale=GUIDANCE,
        width=width,
        output_type="np",
        references=grey,
    )
