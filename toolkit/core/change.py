"""What a linear adapter does to a layer, and the one place where it is carried out.

    weight' = weight + up @ down + rows[:, None] * weight + (mask_up @ mask_down) * weight + dense
    bias'   = bias + bias_change

A variant gives its Change; forward, merge and fold are derived from it. A convolution's weight is seen as
(out, in * kernel): `down` is then a kernel, and `up` one of size 1 behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By the number of sides of the weight."""


@dataclass(frozen=True)
class Change:
    """A linear change of a layer. Fields that are None change nothing."""

    down: torch.Tensor | None = None
    """(r, in)"""
    up: torch.Tensor | None = None
    """(out, r)"""
    rows: torch.Tensor | None = None
    """(out,): scales the rows of the base weight."""
    mask_up: torch.Tensor | None = None
    """(out, k)"""
    mask_down: torch.Tensor | None = None
    """(k, in)"""
    bias: torch.Tensor | None = None
    """(out,)"""
    dense: torch.Tensor | None = None
    """(out, in): only for methods that have no smaller form."""

    def scale(self, factor: float | torch.Tensor) -> Change:
        """The change at another strength; only small tensors are touched."""
        if not isinstance(factor, torch.Tensor) and factor == 1:
            return self

        def scale_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor * factor

        small = {name: scale_tensor(getattr(self, name)) for name in ("up", "rows", "mask_up", "bias", "dense")}
        return replace(self, **small)

    def __add__(self, other: Change) -> Change:
        """Both changes as one."""
        return Change.sum([self, other])

    @staticmethod
    def sum(changes: Sequence[Change]) -> Change:
        """All changes as one. Factors are concatenated, so that several adapters cost one product."""
        return Change(
            concat_present([change.down for change in changes], 0),
            concat_present([change.up for change in changes], 1),
            sum_present([change.rows for change in changes]),
            concat_present([change.mask_up for change in changes], 1),
            concat_present([change.mask_down for change in changes], 0),
            sum_present([change.bias for change in changes]),
            sum_present([change.dense for change in changes]),
        )

    def fold_rows_into_mask(self) -> Change:
        """The same change with the rows' factors as one more column of the mask."""
        if self.rows is None or self.mask_down is None:
            return self
        ones = self.mask_down.new_ones(1, self.mask_down.shape[1])
        rows = Change(mask_up=self.rows[:, None], mask_down=ones)
        return replace(self, rows=None) + rows

    @property
    def is_low_rank(self) -> bool:
        """True when LoRA factors (and a bias) say all of it."""
        return self.rows is None and self.mask_up is None and self.dense is None

    @property
    def changes_bias(self) -> bool:
        """Whether it changes a bias; True where it has one without numbers (torch's meta device)."""
        return self.bias is not None and (self.bias.is_meta or bool(self.bias.any()))

    @property
    def is_zero(self) -> bool:
        """True when it changes nothing."""
        pairs = ((self.up, self.down), (self.mask_up, self.mask_down))
        factors = any(up is not None and down is not None and (up @ down).any() for up, down in pairs)
        return not factors and not any(part is not None and part.any() for part in (self.rows, self.bias, self.dense))

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense change (out, in) of a base weight (out, in)."""
        total = torch.zeros_like(weight)
        if self.down is not None and self.up is not None:
            total += self.up @ self.down
        if self.mask_up is not None and self.mask_down is not None:
            total += (self.mask_up @ self.mask_down) * weight
        if self.rows is not None:
            total += self.rows[:, None] * weight
        return total if self.dense is None else total + self.dense


def concat_present(tensors: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    """Those that are there, one behind the other along `dim`; None when none is. Their other dimensions are the same shape."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, dim) if len(there) > 1 else there[0] if there else None


def sum_present(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Sum of those that are there, all of one shape; None when none is."""
    there = [tensor for tensor in tensors if tensor is not None]
    return sum(there[1:], there[0]) if there else None


# ---------------------------------------------------------------------------------------------- forward


def apply_weight(base: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x through a weight (out, in) instead of the base layer's, without bias."""
    if isinstance(base, CONVOLUTIONS):
        kernel = weight.view(-1, *base.weight.shape[1:])
        return CONVOLVE[kernel.dim()](x, kernel, None, base.stride, base.padding, base.dilation)
    return F.linear(x, weight)


def add_projection(base: nn.Module, y: torch.Tensor, code: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y (..., out) + up (out, k) @ code (..., k); for a convolution y (B, out, ...) and code (B, k, ...).

    Computes in the dtype of the code; the factor keeps its own.
    """
    up = up.to(code.dtype)
    if isinstance(base, CONVOLUTIONS):
        kernel = up.view(*up.shape, *[1] * len(base.kernel_size))
        return y + CONVOLVE[kernel.dim()](code, kernel).to(y.dtype)
    if y.dtype != code.dtype:
        return y + F.linear(code, up).to(y.dtype)
    # One product that adds as it goes: no second tensor of the size of y.
    return torch.addmm(y.reshape(-1, y.shape[-1]), code.reshape(-1, code.shape[-1]), up.t()).view(y.shape)


def broadcast_channels(base: nn.Module, channel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(out,) in the shape and dtype that meets y (..., out), or (B, out, ...) of a convolution."""
    channel = channel.to(y.dtype)
    return channel.view(-1, *[1] * len(base.kernel_size)) if isinstance(base, CONVOLUTIONS) else channel


def is_frozen_and_unhooked(base: nn.Module) -> bool:
    """Whether a linear layer is frozen and nobody hooks into it, so that its product may be taken in its place.

    Asked in every forward pass, since hooks come and go: it looks at dicts that the layer has anyway.
    """
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    replaced = "forward" in base.__dict__  # as accelerate does to move a layer's weights
    learns = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return not (hooks or replaced or learns)


def forward_with_delta(base: nn.Module, x: torch.Tensor, change: Change, plain: bool) -> torch.Tensor:
    """The output (..., out) of a layer under a change, for x (..., in).

    plain: whether it is an nn.Linear with its weight in full (quantised.is_plain).
    """
    if plain and is_frozen_and_unhooked(base):
        return joint_forward(base, x, change, [])[0]
    return apply_change(base, change, x, base(x), lambda: base.weight.flatten(1))


def apply_change(
    base: nn.Module, change: Change, x: torch.Tensor, y: torch.Tensor, weight: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The base layer's output y (..., out) of x (..., in) -> the changed layer's.

    weight() is the frozen weight (out, in), asked for by a mask only.
    """
    if change.rows is not None:
        unbiased = y if base.bias is None else y - broadcast_channels(base, base.bias, y)
        y = y + broadcast_channels(base, change.rows, y) * unbiased
    if change.mask_up is not None and change.mask_down is not None:
        mask = change.mask_up @ change.mask_down
        y = y + apply_weight(base, x, (mask * weight().to(mask.dtype)).to(x.dtype))
    if change.down is not None and change.up is not None:
        y = add_projection(base, y, apply_weight(base, x, change.down.to(x.dtype)), change.up)
    if change.dense is not None:
        y = y + apply_weight(base, x, change.dense.to(x.dtype))
    if change.bias is not None:
        y = y + broadcast_channels(base, change.bias, y)
    return y


def joint_forward(
    base: nn.Module, x: torch.Tensor, change: Change, matrices: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of a plain layer under a change, (..., out), and x (..., in) through each matrix (k, in), (..., k)."""
    change, flat = change.fold_rows_into_mask(), x.reshape(-1, x.shape[-1])
    low = [] if change.down is None else [change.down]
    y, *codes = joint_products(base, flat, change, [*matrices, *low])
    if change.rows is not None or change.dense is not None or change.bias is not None:
        rest = Change(rows=change.rows, dense=change.dense, bias=change.bias)
        y = apply_change(base, rest, flat, y, lambda: base.weight)
    if change.up is not None and low:
        y.addmm_(codes[-1], change.up.to(y.dtype).t())  # y is nobody else's, so no second tensor of its size
    y, *codes = (value.view(*x.shape[:-1], value.shape[-1]) for value in (y, *codes[: len(matrices)]))
    return y, codes


def joint_products(
    base: nn.Module, x: torch.Tensor, change: Change, matrices: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """x (N, in) through a plain layer under the change's mask, (N, out), and through each matrix (k, in), (N, k)."""
    device, mask = x.device.type, (change.mask_up, change.mask_down)
    if not torch.is_autocast_enabled(device):
        return JointLinear.apply(x, base.weight, base.bias, *mask, *(matrix.to(x.dtype) for matrix in matrices))
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return JointLinear.apply(x.to(dtype), base.weight, base.bias, *mask, *(matrix.to(dtype) for matrix in matrices))


class JointLinear(torch.autograd.Function):
    """x @ (weight * (1 + mask_up @ mask_down)).T + bias, with weight and bias frozen, and x @ matrix.T for each matrix.

    Taken together since they share x: its gradient is summed as the products are made, in one tensor, where autograd would
    make one for each and another for each sum. The product with the weight is built again in the backward pass instead of
    being kept, so training holds no tensor of the weight's size between the passes. x (N, in), weight (out, in), bias (out,),
    mask_up (out, k), mask_down (k, in), matrices (r, in).
    """

    @staticmethod
    def forward(x, weight, bias, mask_up, mask_down, *matrices):
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, apply_mask(weight, mask_up, mask_down).to(x.dtype), bias), *(
            F.linear(x, m) for m in matrices
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, mask_up, mask_down, *matrices = inputs
        ctx.save_for_backward(x, weight, mask_up, mask_down, *matrices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *dcodes):
        x, weight, mask_up, mask_down, *matrices = ctx.saved_tensors
        dx = dmask_up = dmask_down = None
        if ctx.needs_input_grad[0]:
            dx = dy @ apply_mask(weight, mask_up, mask_down).to(x.dtype)
            for dcode, matrix in zip(dcodes, matrices, strict=True):
                dx.addmm_(dcode, matrix)
        if mask_up is not None and any(ctx.needs_input_grad[3:5]):
            full = dy.t() @ x
            full = full.mul_(weight) if full.dtype == weight.dtype else full * weight
            full = full.to(mask_up.dtype)
            dmask_up, dmask_down = full @ mask_down.t(), mask_up.t() @ full
        wanted = zip(dcodes, ctx.needs_input_grad[5:], strict=True)
        return dx, None, None, dmask_up, dmask_down, *(dcode.t() @ x if needs else None for dcode, needs in wanted)


def apply_mask(weight: torch.Tensor, up: torch.Tensor | None, down: torch.Tensor | None) -> torch.Tensor:
    """weight * (1 + up @ down), (out, in), in the finer of the two dtypes; without a mask the weight itself."""
    if up is None or down is None:
        return weight
    return (up @ down).add_(1).mul_(weight) if up.dtype == weight.dtype else (up @ down + 1) * weight
