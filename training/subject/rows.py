"""Training images as latents, in buckets of one size each, and which of them a batch takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...toolkit.core.randomness import permutation, sample_order


@dataclass
class Rows:
    """Images of one size: latents (N, C, H, W) on the device, and for each the numbers of its prompts here."""

    mean: torch.Tensor
    std: torch.Tensor
    prompts: torch.Tensor
    """(N, K): K ways to say an image's caption."""
    without_token: torch.Tensor | None = None
    """(N,): the caption without the subject's token, where that is to be preserved."""
    mask: torch.Tensor | None = None
    """(N, 1, H, W): what each latent pixel's error counts for, 1 on average; None counts all alike."""

    def __len__(self) -> int:
        return len(self.mean)


def pick_rows(sizes: Sequence[int], seed: int, position: int, batch: int) -> tuple[int, list[int]]:
    """The bucket and its rows of the batch that begins at sample number `position`.

    With several buckets an epoch is all their batches in mixed order; a bucket's last batch is filled up with its first rows
    again, so that no image is ever left out.
    """
    if len(sizes) == 1:
        return 0, sample_order(seed, sizes[0], position, batch)
    owners = [bucket for bucket, size in enumerate(sizes) for _ in range(math.ceil(size / batch))]
    epoch, turn = divmod(position // batch, len(owners))
    number = permutation(seed, len(owners), epoch)[turn]
    bucket = owners[number]
    start = (number - owners.index(bucket)) * batch
    rows = permutation(seed + 1 + bucket, sizes[bucket], epoch)
    return bucket, [rows[(start + slot) % sizes[bucket]] for slot in range(batch)]


def bucket_size(width: int, height: int, side: int, unit: int) -> tuple[int, int]:
    """(width, height) that an image is brought to: its own shape as near as multiples of `unit` allow, about side x side in area.

    Shapes beyond 2 : 1 are cut to that.
    """
    shape = min(max(width / height, 0.5), 2.0)
    across = max(1, round(side * math.sqrt(shape) / unit))
    choices = [(across, down) for down in (int(side * side / (across * unit * unit)), round(across / shape)) if down]
    best = min(choices, key=lambda c: (abs(math.log(c[0] / c[1] / shape)), -c[0] * c[1]))
    return best[0] * unit, best[1] * unit


def shuffle_tags(caption: str, count: int, seed: int) -> list[str]:
    """The caption, and `count` times its comma-separated tags in another order behind the first."""
    first, *tags = [tag.strip() for tag in caption.split(",")]
    mixes = (permutation(seed, len(tags), number) for number in range(count)) if len(tags) > 1 else iter(())
    return [caption, *(", ".join([first, *(tags[i] for i in mix)]) for mix in mixes)]
