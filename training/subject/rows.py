"""Training images as latents, in buckets of one size each, and which of them a batch takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

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
    class_prompt: torch.Tensor | None = None
    """(N,): what the class is called, of images that are not trained on."""
    empty: torch.Tensor | None = None
    """(N,): no caption, where captions are dropped."""
    mask: torch.Tensor | None = None
    """(N, 1, H, W): what each latent pixel's error counts for, 1 on average; None counts all alike."""
    references: Sequence[torch.Tensor] = ()
    """Latents (N, C, H, W) of the images that each is made from: one tensor for each reference, of one size."""
    draws: Sequence[int] = ()
    """Row of each draw of a pass over all of them, in which an image with repeats has several; () draws each once."""

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def num_draws(self) -> int:
        """Draws in a pass over all rows."""
        return len(self.draws) or len(self)

    def rows_of(self, draws: Sequence[int]) -> list[int]:
        """The rows of draws by their numbers."""
        return [self.draws[draw] for draw in draws] if self.draws else list(draws)


def pick_rows(sizes: Sequence[int], seed: int, position: int, batch: int) -> tuple[int, list[int]]:
    """The bucket and its rows of the batch that begins at sample number `position`.

    A batch is of one bucket. Each bucket has as many batches as it has of all images, spread evenly, and its images follow each other
    in one stream through all its batches: so each image is drawn as often as any other, whatever shapes the others have.
    """
    if len(sizes) == 1:
        return 0, sample_order(seed, sizes[0], position, batch)
    common = math.gcd(batch, *sizes)
    turns = tuple(size // common for size in sizes)
    epoch, turn = divmod(position // batch, sum(turns))
    order = bucket_order(turns, seed, epoch)
    bucket = order[turn]
    before = epoch * turns[bucket] + order[:turn].count(bucket)
    return bucket, sample_order(seed + 1 + bucket, sizes[bucket], before * batch, batch)


@lru_cache(maxsize=8)
def bucket_order(turns: tuple[int, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """Each bucket as often as it has turns in an epoch: its turns lie one in each equal part of the epoch, at random places of it."""
    random = Random(f"{seed}/{epoch}")
    places = [((n + random.random()) / count, bucket) for bucket, count in enumerate(turns) for n in range(count)]
    return tuple(bucket for _, bucket in sorted(places))


def shuffle_tags(caption: str, count: int, seed: int) -> list[str]:
    """The caption, and `count` times its comma-separated tags in another order behind the first."""
    first, *tags = [tag.strip() for tag in caption.split(",")]
    mixes = (permutation(seed, len(tags), number) for number in range(count)) if len(tags) > 1 else iter(())
    return [caption, *(", ".join([first, *(tags[i] for i in mix)]) for mix in mixes)]
