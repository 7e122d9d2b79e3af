"""The rows of each forward pass on images: which latents and prompts, and with what noise.

Everything is a function of (seed, stream, sample number), so neither processes nor stops change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...toolkit.core.randomness import generator
from ...toolkit.diffusion.noise import Noise
from ..config.images import DiffusionConfig
from .rows import Rows, pick_rows

PRESERVATION_EVERY = 4  # rows, over the whole run, for each one that preservation asks again


@dataclass(frozen=True)
class ImageBatches:
    """What a forward pass is made of."""

    config: DiffusionConfig
    noise: Noise
    device: torch.device
    instance: Sequence[Rows]
    """Images of the subject, by size."""
    prior: Sequence[Rows] | None
    """Images of the class, by size, where there are any."""
    host_prompts: bool = False
    """Prompt numbers stay on the host, where texts are re-encoded in each pass."""
    shards_base: bool = False
    """Whether the frozen denoiser is sharded over the processes."""

    def batch_at(self, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """Rows `slots` of the forward pass that begins at sample `position`; with a prior, as many class rows after them.

        See DenoisingLoss.forward for what they hold.
        """
        config = self.config
        parts = [self.stream_rows(self.instance, 1, 1.0, position, slots)]
        if self.prior is not None:
            parts.append(self.stream_rows(self.prior, 2, config.prior_weight, position, slots))
            if "mask" in parts[0]:
                parts[1]["mask"] = torch.ones_like(parts[0]["mask"])
        batch = {key: torch.cat([part[key] for part in parts if key in part]) for key in parts[0]}
        for key in batch.keys() & {"weight", "preservation_weight"}:
            batch[key] *= len(parts)  # the mean over all rows is then instance mean + weight * class mean
        return batch

    def stream_rows(
        self, buckets: Sequence[Rows], stream: int, weight: float, position: int, slots: list[int]
    ) -> dict[str, torch.Tensor]:
        """Rows of one stream (1 instance, 2 class), each with randomness of its own."""
        config = self.config
        sizes = [rows.num_draws for rows in buckets]
        number, draws = pick_rows(sizes, config.seed + stream, position, config.batch_size)
        rows = buckets[number]
        chosen = rows.rows_of(draws)
        which, shape = torch.tensor([chosen[slot] for slot in slots]), rows.mean.shape[1:]
        drawn, timesteps, prompts = [], [], []
        for slot, row in zip(slots, which.tolist(), strict=True):
            random = generator(config.seed, stream, position + slot)
            both = torch.randn((2, *shape), generator=random)
            timesteps.append(self.noise.sample_timestep(random, *shape[1:]))
            if config.noise_offset:
                both[1] += config.noise_offset * torch.randn(shape[0], 1, 1, generator=random)
            drawn.append(both)
            prompts.append(self.draw_prompt(rows, row, random))
        posterior_noise, noise = torch.stack(drawn, 1).to(self.device, non_blocking=True)
        where = which.to(self.device, non_blocking=True)
        batch = {
            "mean": rows.mean[where],
            "std": rows.std[where],
            "posterior_noise": posterior_noise,
            "noise": noise,
            "timesteps": torch.cat(timesteps).to(self.device, non_blocking=True),
            "prompt": self.to_lookup_device(torch.stack(prompts)),
            "weight": torch.full((len(slots),), weight, device=self.device),
        }
        if rows.mask is not None:
            batch["mask"] = rows.mask[where]
        if not self.drops_references(position):
            batch |= {f"reference_{number}": latents[where] for number, latents in enumerate(rows.references)}
        if rows.without_token is not None:
            batch |= self.preservation_rows(rows.without_token[which], position, slots)
        return batch

    def drops_references(self, position: int) -> bool:
        """Whether the forward pass that begins at sample `position` is without references, in all processes alike."""
        share = getattr(self.config, "reference_dropout", 0.0)
        return share > 0 and float(torch.rand((), generator=generator(self.config.seed, 11, position))) < share

    def draw_prompt(self, rows: Rows, row: int, random: torch.Generator) -> torch.Tensor:
        """The number, a scalar, of the caption that a row is given this time: one of its ways, or none."""
        config, ways = self.config, rows.prompts[row]
        if rows.empty is not None and float(torch.rand((), generator=random)) < config.caption_dropout:
            return rows.empty[row]
        return ways[torch.randint(len(ways), (), generator=random)] if len(ways) > 1 else ways[0]

    def preservation_rows(self, prompts: torch.Tensor, position: int, slots: list[int]) -> dict[str, torch.Tensor]:
        """The rows, one in KEPT_EVERY, that also have to say of these prompts (B,) what the untrained model says.

        They go by their number over the whole run, so that neither batch size nor processes change which rows these are. Where the base
        is sharded, no process asks it alone: who has none of these rows asks one that counts nothing.
        """
        weight = self.config.preservation_weight * PRESERVATION_EVERY
        own = [n for n, slot in enumerate(slots) if (position + slot) % PRESERVATION_EVERY == 0]
        if (
            not own
            and self.shards_base
            and any((position + n) % PRESERVATION_EVERY == 0 for n in range(self.config.batch_size))
        ):
            own, weight = [0], 0.0
        if not own:
            return {}
        return {
            "preservation": torch.tensor(own, device=self.device),
            "preservation_prompt": self.to_lookup_device(prompts[own]),
            "preservation_weight": torch.full((len(own),), weight, device=self.device),
        }

    def to_lookup_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """Prompt numbers (B,) on the device where words are looked up there, here where texts are."""
        return numbers if self.host_prompts else numbers.to(self.device, non_blocking=True)
