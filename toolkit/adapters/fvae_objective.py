"""The terms of FVAE-LoRA's objective that are worth a function of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ROWS = 512  # tokens at a time: what is built in between stays in the processor's cache
TINY = 1e-5  # added to the learned deviation, as released


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout. On the CPU the mask is drawn 16 bits a number, which takes a sixth of the time that torch's takes."""
    if not p or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - p))


def token_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of (...) over tokens, weighted by (...) that sums to 1; at least fp32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values * weights.to(values.dtype)).sum()


def gaussian_kl(mean: torch.Tensor, logvar: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token mean of KL(N(mean, exp(logvar)) || N(0, I)), summed over the latent."""
    mean, logvar = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (mean, logvar))
    return token_mean(0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1), weights)


def reconstruction_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    std: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Token mean of -log N(x; weight @ hidden + bias, diag(std + 1e-5)^2), summed over the width. Returns a scalar.

    hidden (..., H), weight (d, H), bias and std (d,), x (..., d), weights (...).
    """
    return ReconstructionNll.apply(hidden.flatten(0, -2), weight, bias, std, x.flatten(0, -2), weights.flatten())


class ReconstructionNll(torch.autograd.Function):
    """The loss is a scalar, so its gradient is known but for one factor: it is made in the forward pass, a few hundred
    tokens at a time, and nothing of the size of x is kept for the backward pass (but x's own gradient where it is asked for).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, std, x, weights):
        precise = torch.promote_types(std.dtype, torch.float32)
        deviation = std.to(precise) + TINY
        inverse = deviation.reciprocal()
        loss = 0.5 * deviation.square().log().sum() + 0.5 * len(std) * math.log(2 * math.pi)
        squares = torch.zeros_like(deviation)
        dhidden, dx = torch.empty_like(hidden), torch.empty_like(x) if x.requires_grad else None
        dweight, dbias = torch.zeros_like(weight, dtype=precise), torch.zeros_like(bias, dtype=precise)
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            error = torch.sub(x[rows], F.linear(hidden[rows], weight, bias)).to(precise).mul_(inverse)
            share = weights[rows, None].to(precise)
            weighted = error * share
            squares += torch.linalg.vecdot(error, weighted, dim=0)
            slope = weighted.mul_(inverse).neg_()  # gradient in the decoder's output
            dbias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            dweight += slope.t() @ hidden[rows]
            dhidden[rows] = slope @ weight
            if dx is not None:
                dx[rows] = -slope
        dstd = (1 - squares) * inverse
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype), dstd.to(std.dtype), dx)
        return loss + 0.5 * squares.sum()

    @staticmethod
    def backward(ctx, factor):
        grads = [None if g is None else g * factor.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None)
