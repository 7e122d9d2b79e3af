"""Composition by columns (ZipLoRA): the fold is exact, the factors have the columns' shape, and the penalty keeps sources apart."""

import pytest
import torch
from torch import nn

from rankfold.toolkit.adapters.auxiliary import auxiliary_losses
from rankfold.toolkit.adapters.composition import ColumnFactors, attach_sources, count_columns, weighted_sums
from rankfold.toolkit.core.change import Change
from rankfold.training.config.compose import ComposeConfig
from rankfold.training.config.defaults import resolve_defaults
from rankfold.training.config.unused import unused_settings

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 8)),
}


def sources_for(layer, count=2, *, dense=False, bias=False):
    out, columns = layer.weight.flatten(1).shape
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    return [
        {
            "0": Change(
                down=draw(n + 1, columns),
                up=draw(out, n + 1),
                dense=draw(out, columns) if dense else None,
                bias=draw(out) if bias else None,
            )
        }
        for n in range(count)
    ]


def mixed(kind, penalty=0.01, **parts):
    """A net of one layer with two sources, factors drawn; the plain layer, the sources, the mixture."""
    torch.manual_seed(0)
    plain = LAYERS[kind][0]()
    net = nn.Sequential(plain).requires_grad_(False)
    sources = sources_for(plain, **parts)
    columns = count_columns(plain, [source["0"] for source in sources])
    mixtures = attach_sources(net, sources, lambda name: ColumnFactors(len(sources), columns, penalty=penalty))
    with torch.no_grad():
        mixtures["0"].coefficients.logits.normal_(1.0, 0.5)
    return net, plain, sources, mixtures


@pytest.mark.parametrize("parts", [{}, {"dense": True}, {"bias": True}])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_fold_is_the_formula(kind, parts):
    net, plain, sources, mixtures = mixed(kind, **parts)
    factors = mixtures["0"].coefficients()
    weight = plain.weight.flatten(1)
    assert factors.shape == (2, weight.shape[1])
    change = weighted_sums(mixtures)["0"]
    expected = sum(source["0"].delta_weight(weight) * own for source, own in zip(sources, factors, strict=True))
    torch.testing.assert_close(change.delta_weight(weight), expected)
    assert len(change.down) == 3  # the sum of the ranks
    assert change.is_low_rank != parts.get("dense", False)
    x = torch.randn(LAYERS[kind][1])
    known = net.eval()(x)
    plain.weight.data += expected.detach().view_as(plain.weight)
    if change.bias is not None:
        plain.bias.data += change.bias
    torch.testing.assert_close(plain(x), known, rtol=1e-4, atol=1e-5)


def test_it_starts_as_both_adapters_switched_on():
    factors = ColumnFactors(2, 6, penalty=0.01)
    assert torch.equal(factors(), torch.ones(2, 6))
    assert float(factors.overlap()) == pytest.approx(0.01)


def test_the_penalty_is_summed_over_pairs_and_layers_and_is_of_training_alone():
    net, _, _, mixtures = mixed("linear", penalty=0.5)
    m = mixtures["0"].coefficients().detach()
    x = torch.randn(3, 6)
    for training, known in ((True, 0.5 * float((m[0] * m[1]).abs().mean())), (False, 0.0)):
        net.train(training)
        with auxiliary_losses() as collected:
            net(x)
            net(x)  # called twice it counts once
        assert float(collected.total()) == pytest.approx(known)
    three = ColumnFactors(3, 4, penalty=1.0)
    with torch.no_grad():
        three.logits.copy_(torch.tensor([[1.0], [-2.0], [3.0]]).expand(3, 4))
    assert float(three.overlap()) == pytest.approx(2 + 3 + 6)


def test_the_penalty_keeps_sources_apart():
    """Where the data leave it open whose column is used, one of the two is given up."""
    overlaps = []
    for penalty in (0.0, 0.1):
        net, _, _, mixtures = mixed("linear", penalty=penalty)
        factors, goal, x = mixtures["0"].coefficients, torch.randn(64, 5), torch.randn(64, 6)
        optimizer = torch.optim.Adam(factors.parameters(), lr=0.02)
        for _ in range(150):
            with auxiliary_losses() as collected:
                loss = (net(x) - goal).square().mean() * 1e-3
            (loss + collected.total()).backward()
            optimizer.step()
            optimizer.zero_grad()
        overlaps.append(float((factors.logits[0] * factors.logits[1]).abs().mean()))
    assert overlaps[1] < 0.1 * overlaps[0]


@pytest.mark.parametrize(
    ("given", "name", "why"),
    [
        ({"column_penalty": 0.1}, "column-penalty", "it goes with --tie column, which is not given"),
        ({"tie": "column", "temperature": 2.0}, "temperature", "the factors of --tie column are no softmax"),
        ({"tie": "column", "free": True}, "free", "the factors of --tie column are no softmax"),
        ({"tie": "column", "column_penalty": 0.1}, "", ""),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, given, name, why):
    said = unused_settings(resolve_defaults(ComposeConfig(images=tmp_path, **given)))
    assert said == ([f"--{name} has no effect: {why}."] if name else [])
