"""Several trained adapters as one (Asadi, Beitollahi et al. 2024, arXiv 2402.15414).

    weight' = weight + sum_n w_n * change_n        for each layer, with weights w of its own

uniform: w_n = 1 / N. Learned: w = softmax(v / temperature), v = 1 at the start and so uniform, v trained and all else frozen;
or w = v itself, unconstrained. By columns (ZipLoRA, Shah et al. 2023, arXiv 2311.13600): w_n is a factor for each column of
change_n, 1 at the start, with a penalty on columns that several sources use; changes of biases, which have no columns, are summed.
A source that does not touch a layer counts there as a change of nothing. The sum is exact: plain LoRA
whose rank is the sum of the ranks, which `truncate_ranks` shortens without ever building a matrix of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.change import Change, concat_present, forward_with_delta
from ..core.modules import replace_module
from . import auxiliary
from .approximate import low_rank
from .base import at_least_fp32
from .fold import Folded, to_cpu
from .quantized import is_plain


class MixingCoefficients(nn.Module):
    """The weights (N,) of N sources in one layer, or in all layers that share it."""

    def __init__(self, count: int, *, temperature: float = 1.0, free: bool = False) -> None:
        super().__init__()
        self.temperature, self.free = temperature, free
        self.logits = nn.Parameter(torch.full((count,), 1 / count if free else 1.0))

    def forward(self) -> torch.Tensor:
        """The weights, (N,)."""
        return self.logits if self.free else (self.logits / self.temperature).softmax(0)


class ColumnFactors(nn.Module):
    """Factors (N, in) for the columns of N sources' changes in one layer."""

    def __init__(self, count: int, columns: int, *, penalty: float) -> None:
        super().__init__()
        self.penalty = penalty
        self.logits = nn.Parameter(torch.ones(count, columns))

    def forward(self) -> torch.Tensor:
        """The factors, (N, in)."""
        return self.logits

    def overlap(self) -> torch.Tensor:
        """The penalty, a scalar: its weight times the mean over columns of |m_a * m_b|, summed over pairs of sources."""
        size = self.logits.abs()
        pairs = (size.sum(0).square() - size.square().sum(0)) / 2
        return self.penalty * pairs.mean()


class Mixture(nn.Module):
    """A frozen layer with the frozen changes of N sources, added up by weights: all of them cost one product."""

    def __init__(
        self, base_layer: nn.Module, changes: Sequence[Change], coefficients: MixingCoefficients | ColumnFactors
    ) -> None:
        super().__init__()
        self.base_layer, self.coefficients, self.is_plain_linear = base_layer, coefficients, is_plain(base_layer)
        weight = self.weight.detach().flatten(1)
        changes = [expand_masks(change, weight) for change in changes]
        owners = [n for n, change in enumerate(changes) if change.down is not None for _ in change.down]
        self.register_tensor(
            "down", concat_present([change.down for change in changes], 0)
        )  # (R, in), R the sum of the ranks
        self.register_tensor("up", concat_present([change.up for change in changes], 1))  # (out, R)
        self.register_tensor("owner", torch.tensor(owners, dtype=torch.long))  # (R,): whose column of up
        self.register_tensor("biases", stack_or_zeros([change.bias for change in changes]))  # (N, out)
        self.register_tensor("dense", stack_or_zeros([change.dense for change in changes]))  # (N, out, in)

    def register_tensor(self, name: str, tensor: torch.Tensor | None) -> None:
        """Keeps a tensor of any shape where the weight is; it is not saved, since the sum is."""
        self.register_buffer(name, None if tensor is None else tensor.to(self.weight.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, (out, in, ...)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias, shape (out,)."""
        return self.base_layer.bias  # type: ignore[return-value]

    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""
        return self.base_layer

    def weighted_sum(self) -> Change:
        """The weighted sum."""
        w = self.coefficients()
        if isinstance(self.coefficients, ColumnFactors):
            return Change(
                down=None if self.down is None else self.down * w[self.owner],
                up=self.up,
                bias=None if self.biases is None else self.biases.sum(0),
                dense=None if self.dense is None else (self.dense * w[:, None]).sum(0),
            )
        return Change(
            down=self.down,
            up=None if self.up is None else self.up * w[self.owner],
            bias=None if self.biases is None else w @ self.biases,
            dense=None if self.dense is None else torch.tensordot(w, self.dense, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), or (B, in, H, W) for a convolution."""
        if self.training and isinstance(self.coefficients, ColumnFactors) and auxiliary.should_compute_loss():
            overlap = self.coefficients.overlap()
            if (collected := auxiliary.current_collector()) is not None:
                collected.add(f"columns of {id(self)}", overlap)  # by itself, so that layers are summed
        return forward_with_delta(self.base_layer, x, self.weighted_sum(), self.is_plain_linear)


def expand_masks(change: Change, weight: torch.Tensor) -> Change:
    """The change with what scales the weight (out, in) written out."""
    if change.rows is None and change.mask_up is None:
        return change
    scaled = replace(change, down=None, up=None, bias=None)
    return Change(change.down, change.up, bias=change.bias, dense=scaled.delta_weight(at_least_fp32(weight).cpu()))


def stack_or_zeros(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One on the other, (N, ...) of tensors of one shape, zeros for those that are missing; None when none is."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack([torch.zeros_like(there[0]) if t is None else t for t in tensors]) if there else None


# ---------------------------------------------------------------------------------------------- a model's layers


def attach_sources(
    model: nn.Module, sources: Sequence[Folded], coefficients_of: Callable[[str], MixingCoefficients | ColumnFactors]
) -> dict[str, Mixture]:
    """Puts the sources on a frozen model; weights_of(layer name) may give several layers the same weights."""
    mixtures = {}
    for name in layer_names(sources):
        changes = [source.get(name, Change()) for source in sources]
        mixtures[name] = Mixture(model.get_submodule(name), changes, coefficients_of(name)).to(
            model.get_submodule(name).weight.device
        )
        replace_module(model, name, mixtures[name])
    return mixtures


def layer_names(sources: Sequence[Folded]) -> list[str]:
    """Layers that any source changes, each once, in order."""
    return list(dict.fromkeys(name for source in sources for name in source))


def count_columns(layer: nn.Module, changes: Sequence[Change]) -> int:
    """Columns of a layer's weight (out, in * kernel), which a quantised layer's own tensor does not show."""
    wide = [t for change in changes for t in (change.down, change.mask_down, change.dense) if t is not None]
    return wide[0].shape[1] if wide else layer.weight.flatten(1).shape[1]  # type: ignore[operator, union-attr]


def coefficient_factory(tie: str, make: Callable[[], MixingCoefficients]) -> Callable[[str], MixingCoefficients]:
    """weights_of for `attach_sources`: weights for each layer, each block, or one for all (global)."""
    keys = {"layer": lambda name: name, "block": block_name, "global": lambda name: ""}
    made: dict[str, MixingCoefficients] = {}

    def coefficients_of(name: str) -> MixingCoefficients:
        key = keys[tie](name)
        if key not in made:
            made[key] = make()
        return made[key]

    return coefficients_of


def block_name(name: str) -> str:
    """The block that a layer is in: its name up to the last number with two names or more behind it.

    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0' -> '...transformer_blocks.0'.
    """
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit() and len(words) - i > 2]
    return ".".join(words[: numbers[-1] + 1]) if numbers else words[0]


# ---------------------------------------------------------------------------------------------- the sum


@torch.no_grad()
def weighted_sums(mixtures: dict[str, Mixture]) -> Folded:
    """Each layer's weighted sum, in main memory."""
    return {name: to_cpu(mixture.weighted_sum()) for name, mixture in mixtures.items()}


def sum_sources(sources: Sequence[Folded], weights: Sequence[float]) -> Folded:
    """The same for weights that are alike in all layers, without a model."""
    return {
        name: sum((s[name].scale(w) for s, w in zip(sources, weights, strict=True) if name in s), Change())
        for name in layer_names(sources)
    }


def truncate_ranks(folded: Folded, weights: dict[str, Any], max_rank: int) -> tuple[Folded, dict[str, float]]:
    """Each change as plain LoRA of at most this rank, and the relative errors. weights: the frozen ones (out, in)."""
    short = {name: low_rank(change, weights[name], max_rank=max_rank) for name, change in folded.items()}
    return {name: change for name, (change, _) in short.items()}, {name: error for name, (_, error) in short.items()}
