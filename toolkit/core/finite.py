"""Whether numbers are numbers: quickly, for files of many gigabytes."""

from __future__ import annotations

import math

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor, whatever its shape and dtype, is NaN or infinity.

    Their sum is then finite, too, unless it overflows; in fp64 that of fp32 and smaller numbers cannot.
    """
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # fp8 has no sums
    return math.isfinite(float(tensor.sum())) or math.isfinite(float(tensor.sum(dtype=torch.float64)))
