"""Randomness as a function of (seed, step, sample): nothing to save, nothing to restore, the same on every device."""

from __future__ import annotations

from functools import lru_cache

import torch

MASK_64 = 2**64 - 1


def mix_seed(*key: int) -> int:
    """A 63-bit seed from whole numbers: the mixing function of SplitMix64 (Steele et al. 2014), one round per number."""
    state = 0
    for number in key:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state >> 1


def generator(*key: int) -> torch.Generator:
    """A CPU generator for this key."""
    return torch.Generator().manual_seed(mix_seed(*key))


def sample_order(seed: int, count: int, start: int, batch: int) -> list[int]:
    """Rows number start .. start + batch of the endless shuffled passes over `count` rows."""
    return [permutation(seed, count, position // count)[position % count] for position in range(start, start + batch)]


@lru_cache(maxsize=64)
def permutation(seed: int, count: int, epoch: int) -> tuple[int, ...]:
    """The order of the rows in one pass over them."""
    return tuple(torch.randperm(count, generator=generator(seed, 11, epoch)).tolist())
