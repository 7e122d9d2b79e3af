"""Approximations, for adapters that no plain LoRA equals. Each says its error; nothing here is called exact.

- An adapter whose output is not linear in its input is linearised: by the change that its variant says is nearest, or else by least
  squares on the inputs that the layer really sees; the error is that on other inputs.
- A change of full rank is cut by a singular value decomposition to the smallest rank within an error bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.change import Change
from ..core.devices import to_float64
from .attach import adapter_layers
from .base import AdapterLayer
from .fold import Folded, base_weight, has_adapter, nearest_change, to_cpu

NOTHING = 1e-5  # relative error that single precision cannot tell from none
RIDGE = 1e-6  # share of the mean square that is added to the inputs' second moments before they are inverted


class Moments:
    """Sums over the tokens a layer has seen: products of its inputs, with a 1 at their end, and of the effects, in float64."""

    def __init__(self) -> None:
        self.sums: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, x: torch.Tensor, e: torch.Tensor) -> None:
        """Takes inputs (N, in) and effects (N, out)."""
        x, e = to_float64(torch.cat((x, x.new_ones(len(x), 1)), 1)), to_float64(e)
        new = (x.t() @ x, e.t() @ x)
        self.sums = new if self.sums is None else tuple(a + b for a, b in zip(self.sums, new, strict=True))  # type: ignore[assignment]

    def fit(self, *, bias: bool) -> Change:
        """The affine (or linear) map nearest to the effects."""
        assert self.sums is not None
        xx, ex = self.sums
        if not bias:
            xx, ex = xx[:-1, :-1], ex[:, :-1]
        ridge = torch.full((len(xx),), RIDGE * float(xx.diagonal().mean()), dtype=xx.dtype, device=xx.device)
        fitted = torch.linalg.solve(xx + ridge.diag(), ex.t()).t().float()
        weight = fitted[:, :-1] if bias else fitted
        return Change(dense=weight.contiguous(), bias=fitted[:, -1].contiguous() if bias else None)


class Missed:
    """What a given change misses of an adapter's effects, summed over what a layer has seen."""

    def __init__(self, change: Change) -> None:
        self.change, self.squares = change, [0.0, 0.0]

    def add(self, layer: AdapterLayer, x: torch.Tensor, plain: torch.Tensor, effect: torch.Tensor) -> None:
        """Takes inputs (..., in), the base layer's outputs (..., out) and the effects (..., out)."""
        given = layer.apply_change(self.change, x.float(), plain.float()) - plain
        self.squares[0] += float(to_float64(given - effect).square().sum())
        self.squares[1] += float(to_float64(effect).square().sum())

    def error(self) -> float:
        """The norm of what is missed over that of the effects."""
        missed, all_of_it = self.squares
        return (missed / all_of_it) ** 0.5 if all_of_it else 0.0


def watch_effects(
    layers: dict[str, AdapterLayer],
    run: Callable[[], Any],
    take: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """While `run()` runs the model, gives `take` each layer's name, input (..., in), base output and effect (..., out)."""

    def record(name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
        plain = module.get_base_layer()(inputs[0])
        take(name, inputs[0], plain, output - plain)

    hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def linearize(
    model: nn.Module, run: Callable[[], Any], check: Callable[[], Any], adapter: str = "default", *, bias: bool = True
) -> tuple[Folded, dict[str, float]]:
    """A linear change for each layer with the adapter: its variant's own, or one fitted to what it does while `run()` runs the model.

    Returns the changes, and for each layer the norm of what they miss over the norm of the effect while `check()` runs the model, which
    should be on other inputs: a fit is always near to what it was fitted to. The model must be in eval mode, with this adapter alone
    active at strength 1; where changes are fitted, linear layers only.
    """
    layers: dict[str, Any] = {
        name: layer for name, layer in adapter_layers(model).items() if has_adapter(layer, adapter)
    }
    changes = {name: change for name, layer in layers.items() if (change := nearest_change(layer, adapter))}
    moments = {name: Moments() for name in layers if name not in changes}
    if moments:
        watch_effects(
            {name: layers[name] for name in moments},
            run,
            lambda name, x, plain, effect: moments[name].add(x.flatten(0, -2), effect.flatten(0, -2)),
        )
        changes |= {name: seen.fit(bias=bias) for name, seen in moments.items() if seen.sums is not None}
    missed = {name: Missed(change) for name, change in changes.items()}
    watch_effects(
        {name: layers[name] for name in missed},
        check,
        lambda name, x, plain, effect: missed[name].add(layers[name], x, plain, effect),
    )
    return {name: to_cpu(change) for name, change in changes.items()}, {n: one.error() for n, one in missed.items()}


def low_rank(
    change: Change, weight: torch.Tensor, max_error: float = 0.0, *, max_rank: int | None = None
) -> tuple[Change, float]:
    """LoRA factors of the least rank that keep within max_error of the change, and the error: both in Frobenius norm, relative.

    weight: the frozen weight (out, in) that the change belongs to. max_rank goes before max_error. Factors that are short
    enough as they are stay as they are; longer ones are cut without a matrix of the weight's size.
    """
    if change.is_low_rank and (change.down is None or max_rank is None or len(change.down) <= max_rank):
        return change, 0.0
    if not change.is_low_rank and max_rank is None and max_error <= NOTHING:
        return exact_factors(change, weight), 0.0
    left, values, right = factored_svd(change) if change.is_low_rank else dense_svd(change, weight)
    squares = to_float64(values).square()
    whole = squares.sum()
    if not whole:
        return Change(bias=change.bias), 0.0
    missed = ((whole - squares.cumsum(0)).clamp(min=0) / whole).sqrt()  # missed[k]: error with k + 1 values
    within = (missed <= max(max_error, NOTHING)).nonzero()
    rank = int(within[0]) + 1 if len(within) else len(values)
    rank = rank if max_rank is None else min(rank, max_rank)
    root = values[:rank].sqrt()
    factors = Change(down=root[:, None] * right[:rank], up=left[:, :rank] * root, bias=change.bias)
    return factors, float(missed[rank - 1])


def exact_factors(change: Change, weight: torch.Tensor) -> Change:
    """LoRA factors of the change of a weight (out, in) by a whole matrix, without a singular value decomposition of it.

    Where its rank is at most a quarter of its shorter side, a random sketch of that many columns spans all of it (Halko et al. 2011,
    arXiv 0909.4061), and the factors are of that rank; otherwise they are the matrix and an identity.
    """
    matrix = change.delta_weight(weight.float())
    if not matrix.any():
        return Change(bias=change.bias)
    limit = min(matrix.shape) // 4
    generator = torch.Generator(matrix.device).manual_seed(0)
    for width in sorted({min(64, limit), limit} - {0}):
        sketch = matrix @ torch.randn(matrix.shape[1], width, generator=generator, device=matrix.device)
        basis = torch.linalg.qr(sketch).Q
        core = basis.t() @ matrix
        if float((matrix - basis @ core).norm()) <= NOTHING * float(matrix.norm()):
            left, values, right = torch.linalg.svd(core, full_matrices=False)
            kept = values > NOTHING * values[0]
            root = values[kept].sqrt()
            return Change(down=root[:, None] * right[kept], up=basis @ left[:, kept] * root, bias=change.bias)
    out, fan_in = matrix.shape
    eye = torch.eye(min(out, fan_in), device=matrix.device)
    down, up = (eye, matrix) if fan_in <= out else (matrix, eye)
    return Change(down=down, up=up, bias=change.bias)


def dense_svd(change: Change, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors (out, k) and (k, in) and values (k,) of a change of any kind."""
    return torch.linalg.svd(change.delta_weight(weight.float()), full_matrices=False)


def factored_svd(change: Change) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of a plain low-rank change, by way of a matrix of its rank."""
    assert change.up is not None
    assert change.down is not None
    up, core_up = torch.linalg.qr(to_float64(change.up))
    down, core_down = torch.linalg.qr(to_float64(change.down).t())
    left, values, right = torch.linalg.svd(core_up @ core_down.t(), full_matrices=False)
    return tuple(part.to(change.up.device, torch.float32) for part in (up @ left, values, right @ down.t()))  # type: ignore[return-value]


def low_rank_all(model: nn.Module, folded: Folded, max_error: float) -> tuple[Folded, dict[str, float]]:
    """`low_rank` for every layer; returns the changes and the errors."""
    layers: dict[str, BaseTunerLayer] = adapter_layers(model)
    cut = {n: low_rank(change, base_weight(layers[n]).float().cpu(), max_error) for n, change in folded.items()}
    return {name: change for name, (change, _) in cut.items()}, {name: error for name, (_, error) in cut.items()}
