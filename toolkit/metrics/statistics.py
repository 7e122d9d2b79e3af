"""Shares and means with their intervals, and tests between two models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

LEVEL = 1.959964  # of the normal distribution, for intervals of 95 %


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, z = right / count, LEVEL**2 / count
    middle = (share + z / 2) / (1 + z)
    half = LEVEL / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p of as uneven a split or more, among the rows on which two models differ (McNemar 1947)."""
    count, most = gained + lost, max(gained, lost)
    term = tail = math.comb(count, most)
    for k in range(most, count):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**count)


def cluster_interval(
    values: Sequence[float], clusters: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean whose values come in clusters (questions about one image): whole clusters are drawn."""
    names = sorted(set(clusters))
    sums, counts = Counter(), Counter()
    for value, name in zip(values, clusters, strict=True):
        sums[name] += value
        counts[name] += 1
    total, size = np.array([sums[n] for n in names], dtype=float), np.array([counts[n] for n in names], dtype=float)
    chosen = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = total[chosen].sum(1) / size[chosen].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def mean_with_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float | int]:
    """A mean with its interval: Wilson's when all is right or wrong and no two values share a cluster, the clusters' otherwise."""
    mean, count = sum(values) / len(values), len(set(clusters))
    if count == len(clusters) and all(value in (0.0, 1.0) for value in values):
        low, high = wilson_interval(sum(values), len(values))
    else:
        low, high = cluster_interval(values, clusters)
        if low == high and 0 <= mean <= 1:  # shares all alike: the bootstrap would be sure after three rows
            low, high = wilson_interval(mean * count, count)
    return {"mean": mean, "low": low, "high": high, "rows": len(values)}


def verdict(difference: Sequence[float], clusters: Sequence[str]) -> tuple[str, float, float]:
    """'improved' or 'worse' only when the paired 95 % interval says so and the clusters' signs too, 'no difference shown' otherwise;
    and that interval.

    The bootstrap alone would be sure after one row. difference: what each row gained, tuned minus base.
    """
    low, high = cluster_interval(difference, clusters)
    sums: Counter[str] = Counter()
    for value, name in zip(difference, clusters, strict=True):
        sums[name] += value  # type: ignore[assignment]
    sure = mcnemar_p(sum(value > 0 for value in sums.values()), sum(value < 0 for value in sums.values())) < 0.05
    word = "improved" if low > 0 and sure else "worse" if high < 0 and sure else "no difference shown"
    return word, low, high


def safe_ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole else 0.0


def bootstrap_interval(
    values_N: torch.Tensor, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values_N), (draws, len(values_N)), generator=random)
    means = values_N.float()[rows].mean(1)
    edge = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([edge, 1 - edge]))
    return float(low), float(high)
