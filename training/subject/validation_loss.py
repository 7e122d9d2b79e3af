"""The denoising loss at fixed noise and timesteps: the curve that the loss of training steps, each with noise of its own, is not.

On held-out images it falls as long as the subject is learned and rises when the training images are learned by heart; on the training
images it only falls. On the class prompt it says what is lost of the class.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .rows import Rows
from .training import ImageTraining

DRAWS = 9  # of noise and timestep for each image, a third of them in each band
BANDS = ("clean", "middle", "noisy")  # thirds of the way from image to noise
MAX_IMAGES = 16  # of each kind that are measured
BATCHES_AT_ONCE = 4
STREAM = 12  # of the randomness that is drawn here


class ValidationLoss:
    """Batches with their noise, drawn once, and their losses."""

    def __init__(self, training: ImageTraining, seed: int) -> None:
        """training: with images held out."""
        assert training.data.held_out is not None
        self.training = training
        held_out = training.data.held_out
        self.batches = {
            "validation_loss": fixed_batches(training, held_out, seed),
            "training_loss": fixed_batches(training, training.data.instance, seed),
        }
        as_class = [
            replace(rows, prompts=rows.class_prompt[:, None]) for rows in held_out if rows.class_prompt is not None
        ]
        self.batches["class_loss"] = fixed_batches(training, as_class, seed)

    def measure(self) -> tuple[dict[str, float], torch.Tensor]:
        """Each loss, and of the held-out images those of each band of timesteps; then the latter by image and draw, (N, DRAWS)."""
        losses = {name: self.losses(batches) for name, batches in self.batches.items()}
        held_out_ND = losses["validation_loss"].reshape(-1, DRAWS)
        bands = held_out_ND.reshape(-1, len(BANDS), DRAWS // len(BANDS)).mean((0, 2))
        named = {f"validation_loss_{band}": float(loss) for band, loss in zip(BANDS, bands, strict=True)}
        return {name: float(values.mean()) for name, values in losses.items()} | named, held_out_ND

    def losses(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The loss of each row, (B,), a few batches at a time: without gradients they take less memory than a training step."""
        rows = BATCHES_AT_ONCE * self.training.config.batch_size
        return torch.cat([self.training.losses_on(batch, rows) for batch in batches])


def fixed_batches(training: ImageTraining, buckets: list[Rows], seed: int) -> list[dict[str, torch.Tensor]]:
    """The first images of each size, `DRAWS` times each, with noise and timesteps drawn once."""
    left, batches = MAX_IMAGES, []
    for rows in buckets:
        if count := min(left, len(rows)):
            batches.append(training.fixed_batch(rows, count, DRAWS, seed=seed, stream=STREAM))
            left -= count
    return batches
