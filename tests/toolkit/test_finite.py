"""Whether all numbers of a tensor are finite, also where their sum overflows."""

import pytest
import torch

from rankfold.toolkit.core.finite import is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    # Half of the greatest: the sum of six overflows, but for fp64, in which it must not.
    large = torch.full((2, 3), torch.finfo(dtype).max / (8 if dtype == torch.float64 else 2), dtype=dtype)
    assert is_finite(large)
    large.view(-1)[4] = float("nan")
    assert not is_finite(large)


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_infinities_that_would_cancel(dtype):
    tensor = torch.zeros(2, 3, dtype=dtype)
    tensor[0, 0], tensor[1, 1] = float("inf"), -float("inf")
    assert not is_finite(tensor)
