"""Factors of layers that a file keeps as one: cut and stacked without a change of what they do."""

import pytest
import torch
from format_table import answer

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats.factor_rows import Factors, cut_rows, stack_rows, swap_factors
from rankfold.toolkit.formats.methods import Frozen, layer_change

COUNTS = (6, 4, 8)
METHODS = {
    "lora": {"up": (None, 3), "down": (3, 5)},
    "dora": {"up": (None, 3), "down": (3, 5), "magnitude": (None,)},
    "loha": {"hada_w1_a": (None, 2), "hada_w1_b": (2, 5), "hada_w2_a": (None, 2), "hada_w2_b": (2, 5)},
    "full": {"diff": (None, 5)},
}


def factors(method, rows, scale=0.7):
    shapes = {role: tuple(rows if side is None else side for side in shape) for role, shape in METHODS[method].items()}
    rank = {"lora": 3, "dora": 3, "loha": 2}.get(method)
    return Factors({role: torch.randn(shape) for role, shape in shapes.items()}, scale, rank)


def delta(given, weight):
    """What factors do to a weight (out, in), as a file's reader computes it."""
    change = layer_change(given.tensors, given.scale, Frozen(tuple(weight.shape), lambda: weight))
    return change.delta_weight(weight)


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("method", METHODS)
def test_stacked_and_cut_they_do_the_same(method, missing):
    torch.manual_seed(0)
    weights = [torch.randn(count, 5) for count in COUNTS]
    pieces = [None if number == missing else factors(method, count) for number, count in enumerate(COUNTS)]
    want = [torch.zeros(c, 5) if p is None else delta(p, w) for p, c, w in zip(pieces, COUNTS, weights, strict=True)]
    stacked = stack_rows(pieces, COUNTS, lambda number: weights[number].norm(dim=1))
    torch.testing.assert_close(delta(stacked, torch.cat(weights)), torch.cat(want), rtol=1e-5, atol=1e-6)
    for cut, own, weight in zip(cut_rows(stacked, COUNTS), want, weights, strict=True):
        torch.testing.assert_close(delta(cut, weight), own, rtol=1e-5, atol=1e-6)
    turned = delta(swap_factors(stacked), torch.cat(torch.cat(weights).chunk(2)[::-1]))
    torch.testing.assert_close(torch.cat(turned.chunk(2)[::-1]), torch.cat(want), rtol=1e-5, atol=1e-6)


def test_a_cut_lora_keeps_no_rank_of_its_neighbours():
    stacked = stack_rows([factors("lora", count) for count in COUNTS], COUNTS, lambda number: torch.ones(0))
    assert stacked.rank == 9
    assert [cut.rank for cut in cut_rows(stacked, COUNTS)] == [3, 3, 3]


def test_what_has_no_rows_of_its_own_is_refused():
    lokr = Factors({"lokr_w1": torch.randn(2, 1), "lokr_w2": torch.randn(3, 5)}, 1.0, None)
    with pytest.raises(UserError, match="lokr_w1, lokr_w2, which cannot be cut or stacked by rows"):
        stack_rows([lokr, None], (6, 6), lambda number: torch.ones(6))
    with pytest.raises(UserError, match="different methods"):
        stack_rows([factors("lora", 6), factors("loha", 4)], (6, 4), lambda number: torch.ones(6))


@pytest.mark.parametrize("method", ["dora", "loha"])
def test_fused_layers_are_written_by_their_own_factors(method):
    """FLUX.1: q, k and v are one layer of the original, and so in the files of ComfyUI and musubi."""
    found = answer("flux-dev", method)
    assert (found["kohya-lycoris"], found["comfyui-lycoris"]) == ("rankfold", "rankfold")


def test_a_product_that_cannot_be_stacked_is_said():
    found = answer("flux-dev", "lokr")
    assert (found["kohya-full"], found["comfyui-lycoris"]) == ("rankfold", "no")
