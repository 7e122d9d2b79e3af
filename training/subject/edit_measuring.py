"""Pairs measured by images that are made from their references while an edit is learned, beside the validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...toolkit.core.run_folder import Run
from ...toolkit.data.subjects import Sample
from ...toolkit.metrics.clip import ClipScorer
from ..evaluation.measuring import PairScorer
from .image_measuring import ImageMeasuring
from .previews import load_pairs


@dataclass(eq=False)
class EditMeasuring(ImageMeasuring):
    """Of images made from the references of held-out pairs: likeness to the target, and to the reference."""

    pairs: Sequence[Sample]
    scorer: PairScorer | None = None
    """Loaded with the first measurement, by the process that measures."""

    def measure(self, run: Run, step: int) -> None:
        """Draws the pairs, writes their figures down and keeps the adapter as it is."""
        captions = [sample.caption or "" for sample in self.pairs]
        images = self.training.draw(captions, [self.config.seed + 5000 + at for at in range(len(captions))], self.pairs)
        losses, _ = self.loss.measure()
        if not self.accelerator.is_main_process:
            return
        self.scorer = self.scorer or PairScorer(
            ClipScorer(self.config.evaluate_clip or None),
            *load_pairs(self.config, self.pairs, self.training.model),
            captions,
        )
        one, faithfulness = self.scorer.measure(step, images)
        more = {"faithfulness": faithfulness, "likeness_unchanged": self.scorer.unchanged}
        self.record(run, one, losses, real=self.scorer.real, **more)
