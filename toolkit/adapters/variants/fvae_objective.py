"""The terms of FVAE-LoRA's objective that are worth a function of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024  # tokens at a time: what is built in between stays in the processor's cache
STD_EPSILON = 1e-5  # added to the learned deviation, as released


def dropout_(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout in place, whatever the shape.

    On the CPU the mask is drawn 16 bits per number, which takes a sixth of the time that torch's takes.
    """
    if not p or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, inplace=True)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x.mul_(kept.to(x.dtype).mul_(1 / (1 - p)))


def token_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of values (...) over tokens, a scalar, by weights (...) that sum to 1; at least fp32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values * weights.to(values.dtype)).sum()


def gaussian_kl(mean: torch.Tensor, logvar: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token mean of KL(N(mean, exp(logvar)) || N(0, I)), summed over the latent."""
    mean, logvar = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (mean, logvar))
    return token_mean(0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1), weights)


def reconstruction_nll(
    z: torch.Tensor,
    hidden: list[tuple[torch.Tensor, torch.Tensor]],
    out: tuple[torch.Tensor, torch.Tensor],
    std: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    p: float,
) -> torch.Tensor:
    """Token mean of -log N(x; decoder(z), diag(std + 1e-5)^2), summed over the width. Returns a scalar.

    z (..., k); hidden: weight (H, .) and bias (H,) of each hidden layer, a ReLU and dropout of p behind each; out: weight
    (d, H) and bias (d,); std (d,); x (..., d); weights (...) of the tokens.
    """
    parameters = [tensor for layer in (*hidden, out) for tensor in layer]
    return DecoderNll.apply(z.flatten(0, -2), x.flatten(0, -2), weights.flatten(), p, std, *parameters)


class DecoderNll(torch.autograd.Function):
    """The loss is a scalar, so its gradient is known but for one factor: it is made in the forward pass, some tokens at a
    time, and no activation is kept for the backward pass.

    The decoder's output V h (in deviations) is never built either. Of the sum of w |u - V h|^2 over tokens, with u the input in
    deviations, loss and gradients follow from the products u V, sum w u h^T, sum w h h^T and V^T V.
    """

    @staticmethod
    def forward(ctx, z, x, weights, p, std, *parameters):
        precise = torch.promote_types(std.dtype, torch.float32)
        layers, (weight, bias) = list(zip(parameters[:-2:2], parameters[1:-2:2], strict=True)), parameters[-2:]
        deviation = std.to(precise) + STD_EPSILON
        inverse = deviation.reciprocal()
        scaled = weight * inverse[:, None].to(weight.dtype)  # V
        gram = scaled.t() @ scaled
        dz, dx = torch.empty_like(z), torch.empty_like(x) if x.requires_grad else None
        grads = [torch.zeros_like(parameter, dtype=precise) for parameter in parameters]
        dlayers = list(zip(grads[:-2:2], grads[1:-2:2], strict=True))
        cross, second = torch.zeros_like(weight, dtype=precise), torch.zeros_like(gram, dtype=precise)
        first, usum, squares = torch.zeros_like(second[0]), torch.zeros_like(deviation), torch.zeros_like(deviation)
        for start in range(0, len(x), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            share = weights[rows, None].to(precise)
            hidden = decode(z[rows], layers, p)
            last, u = hidden[-1], (x[rows] - bias).to(precise).mul_(inverse)
            weighted, low = (last * share.to(last.dtype)), u.to(last.dtype)
            cross += low.t() @ weighted
            second += last.t() @ weighted
            first += weighted.sum(0)
            slope = torch.sub(last @ gram, low @ scaled).mul_(share.to(last.dtype))  # gradient in the last hidden layer
            if dx is not None:
                dx[rows] = (u - last @ scaled.t()).mul_(inverse).mul_(share)
            usum += share[:, 0] @ u
            squares += share[:, 0] @ u.square_()
            dz[rows] = decode_backward(slope, hidden, layers, dlayers, p)
        v = scaled.to(precise)
        reach = v @ second
        grads[-2] = inverse[:, None] * (reach - cross)
        grads[-1] = inverse * (v @ first - usum)
        squares += (v * (reach - 2 * cross)).sum(1)
        loss = 0.5 * (deviation.square().log().sum() + len(std) * math.log(2 * math.pi) + squares.sum())
        dstd = ((1 - squares) * inverse).to(std.dtype)
        ctx.save_for_backward(dz, dx, dstd, *(g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)))
        return loss

    @staticmethod
    def backward(ctx, factor):
        dz, dx, *others = (None if g is None else g * factor.to(g.dtype) for g in ctx.saved_tensors)
        return dz, dx, None, None, *others


def decode(z: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]], p: float) -> list[torch.Tensor]:
    """z (n, k) and what each hidden layer makes of it, (n, H)."""
    hidden = [z]
    for weight, bias in layers:
        hidden.append(dropout_(F.linear(hidden[-1], weight, bias).relu_(), p))
    return hidden


def decode_backward(
    slope: torch.Tensor,
    hidden: list[torch.Tensor],
    layers: list[tuple[torch.Tensor, torch.Tensor]],
    dlayers: list[tuple[torch.Tensor, torch.Tensor]],
    p: float,
) -> torch.Tensor:
    """From the gradient in the last hidden layer (n, H): adds the layers' gradients to dlayers, returns that in z."""
    for (weight, _), (dweight, dbias), after, before in zip(
        layers[::-1], dlayers[::-1], hidden[:0:-1], hidden[-2::-1], strict=True
    ):
        slope = torch.ops.aten.threshold_backward(slope, after, 0).mul_(1 / (1 - p))  # 0 where ReLU or dropout made 0
        dweight += slope.t() @ before
        dbias += slope.sum(0)
        slope = slope @ weight
    return slope
