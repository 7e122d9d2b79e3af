"""The gradients that are written by hand, against numerical ones."""

import pytest
import torch
from torch.autograd import gradcheck

from rankfold.toolkit.adapters.variants import fvae_objective
from rankfold.toolkit.adapters.variants.loratrf import GateProducts
from rankfold.toolkit.core.change import JointLinear


def noise(*shape, trained=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_joint_linear(masked, bias):
    torch.manual_seed(0)
    mask = (noise(5, 2), noise(2, 4)) if masked else (None, None)
    frozen = noise(5, 4, trained=False), noise(5, trained=False) if bias else None
    assert gradcheck(JointLinear.apply, (noise(3, 4), *frozen, *mask, noise(2, 4), noise(3, 4)))
    assert gradcheck(JointLinear.apply, (noise(3, 4), *frozen, *mask, noise(2, 4, trained=False)))


def test_readings():
    torch.manual_seed(0)
    assert gradcheck(GateProducts.apply, (noise(6, 5), noise(5), noise(2, 5)))


@pytest.mark.parametrize("rows", [2, 1024])
def test_decoder_nll(rows, monkeypatch):
    """Also in several blocks of tokens."""
    monkeypatch.setattr(fvae_objective, "CHUNK_TOKENS", rows)
    torch.manual_seed(0)
    weights = torch.rand(5, dtype=torch.float64)
    parameters = [noise(4, 3), noise(4), noise(4, 4), noise(4), noise(6, 4), noise(6)]
    std = torch.rand(6, dtype=torch.float64).add_(0.5).requires_grad_(True)
    inputs = (noise(5, 3), noise(5, 6), weights / weights.sum(), 0.0, std, *parameters)
    assert gradcheck(fvae_objective.DecoderNll.apply, inputs)


def test_decoder_nll_with_dropout(monkeypatch):
    """The masks are drawn in the forward pass; with the same ones, the gradient is autograd's own."""
    torch.manual_seed(0)
    hidden = [(noise(4, 3), noise(4)), (noise(4, 4), noise(4))]
    out, std = (noise(6, 4), noise(6)), torch.rand(6, dtype=torch.float64).add_(0.5).requires_grad_(True)
    z, x, weights = noise(5, 3), noise(5, 6), torch.full((5,), 0.2, dtype=torch.float64)
    masks = [torch.rand(5, 4).ge(0.4).double() / 0.6 for _ in hidden]
    drawn = iter(masks)
    monkeypatch.setattr(fvae_objective, "dropout_", lambda h, p: h.mul_(next(drawn)))
    loss = fvae_objective.reconstruction_nll(z, hidden, out, std, x, weights, 0.4)
    h = z
    for (weight, bias), mask in zip(hidden, masks, strict=True):
        h = torch.relu(h @ weight.T + bias) * mask
    mean, deviation = h @ out[0].T + out[1], std + fvae_objective.STD_EPSILON
    known = -(torch.distributions.Normal(mean, deviation).log_prob(x).sum(-1) * weights).sum()
    torch.testing.assert_close(loss, known)
    leaves = [z, x, std, *out, *(tensor for layer in hidden for tensor in layer)]
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(known, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
