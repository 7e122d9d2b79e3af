"""The proof of an export: what a file differs in, once its reader has loaded it, from the adapter that it was made of.

Numbers that are not numbers count as the worst there is, and every tolerance is a share of what the adapter does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..toolkit.adapters.fold import Folded
from ..toolkit.core.change import Change
from ..toolkit.core.errors import UserError

WEIGHT_TOLERANCE = 1e-4  # of a layer's change, in Frobenius norm
IMAGE_TOLERANCE = 1e-3  # of what the adapter changes in an image, root mean square
HALF_PRECISION_TOLERANCE = 0.2  # the same: what the order of sums makes of an image in 16 bit (0.02 to 0.07 seen)
ROUNDING = 1e-5  # of a pixel, 0..1: what no image in fp32 is exact to
PROOF_FAILED = "{} does not reproduce the adapter{}; nothing was kept of it, and please report this."


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
    relative_error: float = 0.0
    """Largest norm of what a layer's change is off by, over the norm of that change."""
    proven_by_reader: bool = True
    """Whether a loader of the format's own readers read it back, and not only rankfold's."""

    def summary(self) -> list[str]:
        """What was found, for people."""
        least, greatest = self.ranks or (0, 0)
        ranks = "" if not greatest else f", rank {least}" + (f" to {greatest}" if greatest != least else "")
        lines = [
            f"Read back by {self.reader}: {self.layers} layers{ranks}, largest weight error {self.weight_error:.1e}, largest image "
            f"difference {self.image_difference:.1e} (the adapter itself changes it by {self.effect:.2f})."
        ]
        if not self.proven_by_reader:
            lines.append(
                "Not proven here: the programs that read this format cannot be run from here; names and factors are theirs."
            )
        if self.precision != "fp32":
            lines.append(
                f"Compared in {self.precision}, whose rounding is in the image difference; the file holds fp32."
            )
        if self.fault():
            return lines
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

    def fault(self) -> str:
        """How the file fails to do what the adapter does; '' when it does."""
        figures = (self.weight_error, self.relative_error, self.image_difference, self.image_error, self.effect)
        if not all(math.isfinite(figure) for figure in figures):
            return " (a value read back is missing, NaN or infinite)"
        if not self.relative_error <= WEIGHT_TOLERANCE:
            return f" (a layer's change is off by {self.relative_error:.1e} of itself)"
        tolerance = IMAGE_TOLERANCE if self.precision == "fp32" else HALF_PRECISION_TOLERANCE
        alike = self.image_error <= tolerance or self.image_difference <= ROUNDING
        if self.exact and not alike:
            return f" (an image is off by {self.image_error:.1e} of what the adapter changes in it)"
        return ""

    def check(self) -> None:
        """Raises UserError when the file does not do what the adapter does."""
        if fault := self.fault():
            raise UserError(PROOF_FAILED.format(self.path, fault))


def print_proof(proof: Any) -> None:
    """The outcome of an export: a Proof, or a ChatProof.

    Raises:
        UserError: when what was written does not do what the adapter does.
    """
    proof.check()
    print(proof.path, *getattr(proof, "token_files", ()), *proof.summary(), sep="\n")


@dataclass(frozen=True)
class WeightErrors:
    """How far the changes that were read back are from those that were written."""

    largest: float
    relative: float
    layers: int


def compare_weights(
    written: dict[str, Folded],
    loaded: dict[str, Folded],
    weights: dict[str, dict[str, torch.Tensor]],
    dtype: torch.dtype,
) -> WeightErrors:
    """Compares all layers.

    dtype: of the base; some readers round a file's tensors to it as they load them, and then what was written is rounded likewise.

    A layer that was not read back counts as infinite, unless nothing was said of it: where several are one, readers drop such rows. One
    that was read and not written counts as infinite too, unless it changes nothing.
    """
    largest, relative, layers = 0.0, 0.0, 0
    for part, folded in written.items():
        for name, change in folded.items():
            read, weight = loaded.get(part, {}).get(name), weights[part][name]
            if read is None and change.is_zero:
                read = Change()
            if read is None:
                return WeightErrors(math.inf, math.inf, layers)
            pairs = [difference(one, read, weight) for one in (change, round_change(change, dtype))]
            off, share = min(pairs, key=lambda pair: pair[1])
            largest, relative, layers = max(largest, off), max(relative, share), layers + 1
    strange = [
        change
        for part, folded in loaded.items()
        for name, change in folded.items()
        if name not in written.get(part, {})
    ]
    if not all(change.is_zero for change in strange):
        return WeightErrors(math.inf, math.inf, layers)
    return WeightErrors(largest, relative, layers)


def difference(a: Change, b: Change, weight: torch.Tensor) -> tuple[float, float]:
    """(largest difference of a value, norm of the difference over the norm of a) of two changes; infinite where there is no number."""
    one, other = (torch.cat((c.delta_weight(weight).flatten(), bias_of(c, len(weight)))) for c in (a, b))
    off = one - other
    if not bool(torch.isfinite(off).all()):
        return math.inf, math.inf
    norm, missed = float(one.double().norm()), float(off.double().norm())
    return float(off.abs().max()), missed / norm if norm else (math.inf if missed else 0.0)


def bias_of(change: Change, outputs: int) -> torch.Tensor:
    """A change's bias (out,), zeros where it has none."""
    return torch.zeros(outputs) if change.bias is None else change.bias.float()


def round_change(change: Change, dtype: torch.dtype) -> Change:
    """The change with its tensors rounded to a dtype."""
    return Change(**{name: None if t is None else t.to(dtype).to(t.dtype) for name, t in vars(change).items()})


@dataclass(frozen=True)
class ImageErrors:
    """How far an image made with the file is from one made with the adapter."""

    largest: float
    relative: float
    effect: float


def compare_images(tuned: np.ndarray, again: np.ndarray, plain: np.ndarray) -> ImageErrors:
    """Compares images (1, H, W, 3) in 0..1 made with the adapter, with the file, and with neither; NaN makes all infinite."""
    if not all(bool(np.isfinite(image).all()) for image in (tuned, again, plain)):
        return ImageErrors(math.inf, math.inf, math.inf)
    effect = float(np.square(tuned - plain).mean() ** 0.5)
    missed = float(np.square(tuned - again).mean() ** 0.5)
    relative = missed / effect if effect else (math.inf if missed else 0.0)
    return ImageErrors(float(np.abs(tuned - again).max()), relative, float(np.abs(tuned - plain).max()))
