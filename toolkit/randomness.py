"""Randomness as a function of (seed, step, sample): nothing to save, nothing to restore, the same on every device."""

from __future__ import annotations

import numpy as np
import torch


def mixed(*key: int) -> int:
    """A 63-bit seed from a tuple of whole numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator for this key."""
    return torch.Generator().manual_seed(mixed(*key))


def order(seed: int, count: int, start: int, batch: int) -> list[int]:
    """Rows number start .. start + batch of the endless shuffled passes over `count` rows."""
    rows: list[int] = []
    permutations: dict[int, list[int]] = {}
    for position in range(start, start + batch):
        epoch, place = divmod(position, count)
        if epoch not in permutations:
            permutations[epoch] = torch.randperm(count, generator=generator(seed, 11, epoch)).tolist()
        rows.append(permutations[epoch][place])
    return rows
