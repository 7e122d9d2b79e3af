"""Which photos of a subject are held out to measure it by, and which prompts are measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from ...toolkit.core.errors import UserError
from ...toolkit.data.subjects import Sample, find_samples
from ...toolkit.diffusion.load import EMBEDDED
from ..config.subject import NO_PROMPTS, SubjectConfig
from ..evaluation.subject import SubjectTest, read_prompts

MIN_PHOTOS = 4  # of which one can be held out
MEASURED_PAIRS = 16  # of the held-out pairs that are drawn


def split_measured_photos(config: SubjectConfig, samples: list[Sample]) -> tuple[list[Sample], list[Path]]:
    """The samples to train on, and the photos that likeness is measured by.

    Raises:
        UserError: when there are too few to hold one out, or one that shall be held out is not there.
    """
    if not config.evaluate_every:
        return samples, []
    if config.evaluate_images is not None:
        found = find_samples(config.evaluate_images, skip_bad=config.skip_bad, option="--evaluate-images")
        return samples, [sample.path for sample in found]
    files = sorted({sample.path for sample in samples})
    if config.hold_out:
        named = [path for path in files if path.name in config.hold_out]
        if len(named) != len(set(config.hold_out)) or len(named) == len(files):
            raise UserError(
                f"--hold-out {' '.join(config.hold_out)} must name photos of --images, and leave some to train on."
            )
        return [sample for sample in samples if sample.path not in named], named
    if len(files) < MIN_PHOTOS:
        raise UserError(
            f"--images holds {len(files)} photos, too few to hold one out for --evaluate-every: add photos up to {MIN_PHOTOS}, or give "
            "others with --evaluate-images."
        )
    out = set(Random(f"{config.seed}/measured by").sample(files, max(1, len(files) // 5)))
    return [sample for sample in samples if sample.path not in out], sorted(out)


def measured_pairs(config: SubjectConfig, held_out: Sequence[Sample]) -> list[Sample]:
    """The held-out images with references, of which the first are drawn and measured; none where none are drawn.

    Raises:
        UserError: for held-out images of which some have references and some have none, and prompts beside them.
    """
    pairs = [sample for sample in held_out if sample.references]
    if not pairs or config.evaluate_prompts == NO_PROMPTS:
        return []
    if config.evaluate_prompts:
        raise UserError(
            f"--evaluate-prompts {config.evaluate_prompts} is of subjects: images with references are measured by their captions. Leave "
            "it out, or say none, which measures the validation loss alone."
        )
    return pairs[:MEASURED_PAIRS]


def held_out_samples(config: SubjectConfig, samples: list[Sample]) -> list[Sample]:
    """The photos that likeness is measured by, with their captions; none where nothing is measured."""
    if not config.evaluate_every:
        return []
    if config.evaluate_images is not None:
        return find_samples(config.evaluate_images, skip_bad=config.skip_bad, option="--evaluate-images")
    _, photos = split_measured_photos(config, samples)
    return [sample for sample in samples if sample.path in photos and not sample.flip]


def measured_prompts(config: SubjectConfig) -> SubjectTest | None:
    """The prompts that are measured, or None where none are."""
    if not config.evaluate_every or config.evaluate_prompts == NO_PROMPTS:
        return None
    name = config.evaluate_prompts or ("world" if config.base in EMBEDDED else "object")
    return SubjectTest(read_prompts(name), (), config.token, config.class_noun)
