"""Export, proven: an adapter leaves in a format of other tools, is loaded back, and is compared.

What the format can say exactly is exact. The rest is approximated when asked for, and its errors are measured, printed and
written into the file's header.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..toolkit.adapters.approximate import linearize, low_rank_all
from ..toolkit.adapters.change import Change
from ..toolkit.adapters.fold import Folded, fold
from ..toolkit.core.errors import UserError
from ..toolkit.core.out_of_memory import oom_context
from ..toolkit.diffusion.load import open_model, resolve_base
from ..toolkit.diffusion.model import DTYPES, DiffusionModel
from ..toolkit.diffusion.textual_inversion import export_token_embeddings, import_token_embeddings
from ..toolkit.formats import native
from ..toolkit.formats.apply import apply_to_pipeline
from ..toolkit.formats.read import read_lora
from ..toolkit.formats.write import LOW_RANK, Part, check_format, check_representable, drop_biases, write_lora
from .generate import Recipe, adapter_precision, denoise, load_pipeline, native_resolution

ADAPTER = "adapter_0"
STEPS = 8  # of the images that are compared, and of those that an approximation is fitted to
GUIDANCE = 4.0
HALF_PRECISION_TOLERANCE = (
    0.2  # of what the adapter changes: what the order of sums makes of an image in 16 bit (0.02 to 0.07 seen)
)
FLUX_WIDTH = 3072
KOHYA_READERS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PROOF_FAILED = "{} does not reproduce the adapter; do not use it, and please report this."


@dataclass(frozen=True)
class Proof:
    """What the reloaded file differs in from the adapter it was made of."""

    path: Path
    token_files: tuple[Path, ...]
    """Files of the words that the adapter brings."""
    reader: str
    """Whose loader read it back."""
    exact: bool
    """Whether the file says the adapter exactly."""
    approximation: float
    """Largest relative error of a layer's approximation; 0 when exact."""
    weight_error: float
    """Largest difference of a weight or bias change between what was written and what was read back, over all layers."""
    image_difference: float
    """Largest difference of a pixel, 0..1, between images made with the adapter and with the file from the same noise."""
    image_error: float
    """Root mean square of that difference over the root mean square of what the adapter changes."""
    effect: float
    """Largest difference of a pixel that the adapter makes to the base model, for scale."""
    layers: int
    ranks: tuple[int, int] | None
    """Least and greatest rank in the file."""
    precision: str = "fp32"
    """dtype of the base that the images were made with; the file itself is fp32."""

    def summary(self) -> list[str]:
        """What was found, for people."""
        least, greatest = self.ranks or (0, 0)
        ranks = "" if not greatest else f", rank {least}" + (f" to {greatest}" if greatest != least else "")
        lines = [
            f"Read back by {self.reader}: {self.layers} layers{ranks}, largest weight error {self.weight_error:.1e}, largest image "
            f"difference {self.image_difference:.1e} (the adapter itself changes it by {self.effect:.2f})."
        ]
        if self.precision != "fp32":
            lines.append(
                f"Compared in {self.precision}, whose rounding is in the image difference; the file holds fp32."
            )
        if self.exact:
            lines.append("It is exact.")
        else:
            lines.append(
                f"An approximation: a layer's change is missed by up to {self.approximation:.0%}, "
                f"and {self.image_error:.0%} of what the adapter does to an image."
            )
        if self.token_files:
            names = ", ".join(file.name for file in self.token_files)
            lines.append(f"The adapter brings tokens of its own: load {names} too.")
        return lines

    def check(self) -> None:
        """Raises UserError when the file does not do what the adapter does."""
        images_differ = (
            self.image_difference > 1e-5 if self.precision == "fp32" else self.image_error > HALF_PRECISION_TOLERANCE
        )
        if self.weight_error > 1e-5 or (self.exact and images_differ):
            raise UserError(PROOF_FAILED.format(self.path))


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
) -> Proof:
    """Writes the adapter of `folder` in `format` and proves the file through the reader's own loader.

    max_error: approximate what the format cannot represent exactly, each layer to this relative error where that can be chosen;
    None refuses instead. drop_bias: Skip bias changes. width: of the images that are compared, pixels; 0 means the
    base model's own. precision: dtype of the base in the proof, unset the adapter's own; the file
    itself is always fp32.

    Raises:
        UserError: for an unknown format, a missing adapter, or an adapter that the format cannot represent exactly.
    """
    check_format(format)
    family = open_model(resolve_base(base))
    check_parts(family, format, native.check_adapter_folder(folder))
    precision = precision or adapter_precision([str(folder)])
    said = folder / "rankfold.json"
    facts = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    live = load_pipeline(
        Recipe(prompt=prompt, base=base, adapters=(str(folder),), strengths=(1.0,), precision=precision)
    )
    width = width or native_resolution(live)
    draw = lambda pipe: draw_image(pipe, prompt, width)  # noqa: E731
    parts, errors = exportable_changes(live, format, draw, max_error, drop_bias=drop_bias)
    tuned = draw(live)
    exact = not errors and not drop_bias
    words = export_token_embeddings(folder, out)
    proof = Proof(
        folder, tuple(words), "", exact, max(errors.values(), default=0.0), 0.0, 0.0, 0.0, 0.0, 0, rank_range(parts), precision,
    )  # fmt: skip
    path = write_lora(parts, format, out, facts, family.kohya_prefixes)
    fresh = load_pipeline(Recipe(prompt=prompt, base=base, precision=precision))
    plain = draw(fresh)
    for file in words:
        import_token_embeddings(fresh, file)
    weights = {part: frozen_weights(getattr(fresh, part), parts[part].folded) for part in parts}
    reader, loaded = reload_export(fresh, path, format)
    error, layers = weight_error(parts, loaded, weights, DTYPES[precision])
    again = draw(fresh)
    effect = float(np.square(tuned - plain).mean() ** 0.5)
    proof = replace(
        proof,
        path=path,
        reader=reader,
        weight_error=error,
        layers=layers,
        image_difference=float(np.abs(tuned - again).max()),
        image_error=float(np.square(tuned - again).mean() ** 0.5) / max(effect, 1e-12),
        effect=float(np.abs(tuned - plain).max()),
    )
    facts |= {
        "rankfold_proof": json.dumps(asdict(proof) | {"path": path.name, "token_files": [file.name for file in words]})
    }
    write_lora(parts, format, out, facts, family.kohya_prefixes)
    return proof


def check_parts(family: DiffusionModel, format: str, parts: Sequence[str]) -> None:
    """Raises UserError when the readers of a format have no place for one of the parts."""
    kind = family.index["_class_name"]
    nameless = [part for part in parts if part not in family.kohya_prefixes]
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
    pipe: Any, format: str, draw: Callable[[Any], np.ndarray], max_error: float | None, *, drop_bias: bool
) -> tuple[dict[str, Part], dict[str, float]]:
    """Every adapted part's changes as the format can represent them, and the relative errors of those that are approximated."""
    parts: dict[str, Part] = {}
    errors: dict[str, float] = {}
    for name in native.PARTS:
        model = getattr(pipe, name, None)
        if ADAPTER not in getattr(model, "peft_config", {}):
            continue
        folded, missed = fold_or_linearize(pipe, model, format, draw, max_error)
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
    pipe: Any, model: torch.nn.Module, format: str, draw: Callable[[Any], np.ndarray], max_error: float | None
) -> tuple[Folded, dict[str, float]]:
    """The exact fold, or for an adapter that has none, when asked for, its linearisation while images are made.

    Raises:
        UserError: when there is no exact fold and none was asked for.
    """
    try:
        return fold(model, ADAPTER), {}
    except UserError as error:
        if max_error is None:
            raise UserError(f"{error} (--approximate exports the nearest linear one.)") from error
    return linearize(model, lambda: draw(pipe), ADAPTER, bias=not format.startswith("kohya"))


def rank_range(parts: dict[str, Part]) -> tuple[int, int] | None:
    """Least and greatest rank of the factors."""
    ranks = [len(change.down) for part in parts.values() for change in part.folded.values() if change.down is not None]
    return (min(ranks), max(ranks)) if ranks else None


# ---------------------------------------------------------------------------------------------- what is read back


def frozen_weights(model: torch.nn.Module, folded: Folded) -> dict[str, torch.Tensor]:
    """Copies of the weights (out, in * kernel) that will be changed."""
    return {name: model.get_submodule(name).weight.detach().float().flatten(1).clone() for name in folded}  # type: ignore[operator]


def reload_export(pipe: Any, path: Path, format: str) -> tuple[str, dict[str, Folded]]:
    """Loads an exported file as its readers would; returns the reader's name and the changes it found, by part.

    diffusers reads kohya's files only while they hold no diff_b; what it does not read is put into the weights by lora_read.
    """
    if format == "peft":
        found = {}
        for part in native.check_adapter_folder(path):
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
    carrying = [part for part in native.PARTS if "loaded" in getattr(getattr(pipe, part, None), "peft_config", {})]
    return "diffusers", {part: fold(getattr(pipe, part), "loaded") for part in carrying}


def diffusers_reads_kohya(pipe: Any) -> bool:
    """Whether diffusers reads kohya's files for this pipeline: FLUX's only in the width of the released models."""
    kind = type(pipe).__name__
    return kind in KOHYA_READERS or (kind == "FluxPipeline" and pipe.transformer.inner_dim == FLUX_WIDTH)


def weight_error(
    parts: dict[str, Part],
    loaded: dict[str, Folded],
    weights: dict[str, dict[str, torch.Tensor]],
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Largest difference of a weight or bias change between written and read, and the number of layers.

    dtype: of the base; some readers round a file's tensors to it as they load them, and then what was written is rounded likewise.

    A layer that was not read back counts as infinite, unless nothing was said of it: where several are one, readers drop such rows.
    """
    worst, layers = 0.0, 0
    for part, written in parts.items():
        for name, change in written.folded.items():
            read, weight = loaded.get(part, {}).get(name), weights[part][name]
            if read is None and change.is_zero:
                read = Change()
            if read is None:
                return float("inf"), layers
            worst = max(
                worst, min(change_difference(one, read, weight) for one in (change, round_change(change, dtype)))
            )
            layers += 1
    return worst, layers


def change_difference(a: Change, b: Change, weight: torch.Tensor) -> float:
    """Largest difference of what two changes make of a weight (out, in), and of a bias."""
    return max(float((a.delta_weight(weight) - b.delta_weight(weight)).abs().max()), bias_difference(a, b))


def round_change(change: Change, dtype: torch.dtype) -> Change:
    """The change with its tensors rounded to a dtype."""
    return Change(**{name: None if t is None else t.to(dtype).to(t.dtype) for name, t in vars(change).items()})


def bias_difference(a: Change, b: Change) -> float:
    """Largest difference of two bias changes."""
    biases = [change.bias for change in (a, b) if change.bias is not None]
    if len(biases) == 2:
        return float((biases[0] - biases[1]).abs().max())
    return float(biases[0].abs().max()) if biases else 0.0


@torch.no_grad()
def draw_image(pipe: Any, prompt: str, width: int) -> np.ndarray:
    """One image, (1, width, width, 3) in 0..1, without rounding to bytes."""
    return denoise(pipe, [prompt], seeds=[0], steps=STEPS, guidance_scale=GUIDANCE, width=width, output_type="np")
