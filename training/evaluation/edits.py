"""What an adapter is worth that makes images from references: measured on pairs, best on some it was not trained on.

Every pair is drawn from its reference and caption, by the base and with the adapter, from the same seeds. Likeness is the cosine with the
pair's target, faithfulness that with its reference; the reference itself, as if nothing were done, and the target itself stand beside. With
the reference of another pair likeness must fall, or the reference was not read. Intervals are bootstraps in which whole pairs are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ...pipelines.generate import Recipe, check_finite, denoise, max_batch_size, pipeline_family, sampling_pipeline
from ...toolkit.metrics.clip import ClipScorer, paired_similarity
from ...toolkit.metrics.dino import ImageScorer
from ..engine.processes import map_distributed
from .subject import DrawnImages, drawing_settings, mean_with_interval

WAYS = ("base", "tuned", "tuned, another's reference")


@dataclass(frozen=True)
class EditPair:
    """A target, what it is made from, and the words."""

    name: str
    caption: str
    target: Image.Image
    references: tuple[Image.Image, ...]


def evaluate_edits(
    recipe: Recipe, pairs: Sequence[EditPair], n: int, clip: ClipScorer, others: Sequence[ImageScorer] = ()
) -> tuple[dict[str, Any], dict[str, DrawnImages]]:
    """All figures of the recipe's adapters, and the images they were measured on, `n` a pair. others: backbones beside CLIP."""
    drawn = draw_all(recipe, pairs, n)
    names = [pair.name for pair in pairs for _ in range(n)]
    repeat = lambda values: values.repeat_interleave(n, 0)  # noqa: E731
    figures: dict[str, Any] = {}
    for scorer in (clip, *others):
        targets, references = (
            scorer.embed_images([pick(pair) for pair in pairs])
            for pick in (lambda pair: pair.target, lambda pair: pair.references[0])
        )
        own = {way: scorer.embed_images(some.images) for way, some in drawn.items()}
        single = [pair.name for pair in pairs]
        unchanged = mean_with_interval(paired_similarity(references, targets), single)
        likeness = {way: mean_with_interval(paired_similarity(own[way], repeat(targets)), names) for way in own}
        faithful = {way: mean_with_interval(paired_similarity(own[way], repeat(references)), names) for way in own}
        rest = 1 - unchanged["mean"]
        closed = (likeness["tuned"]["mean"] - unchanged["mean"]) / rest if rest > 0 else None
        figures[f"likeness to the target, {scorer.name}"] = (
            {"the reference itself": unchanged} | likeness | {"closed": closed}
        )
        figures[f"faithfulness to the reference, {scorer.name}"] = {"the target itself": unchanged} | faithful
        if scorer is clip:
            words = clip.embed_texts([pair.caption for pair in pairs])
            said = {"the target itself": targets, "the reference itself": references}
            figures["prompt fidelity"] = {
                name: mean_with_interval(paired_similarity(shown, words), single) for name, shown in said.items()
            } | {way: mean_with_interval(paired_similarity(shown, repeat(words)), names) for way, shown in own.items()}
    return figures, drawn


def draw_all(recipe: Recipe, pairs: Sequence[EditPair], n: int) -> dict[str, DrawnImages]:
    """Images of all pairs by base and tuned model; where there are two pairs and more, also from the next pair's references."""
    bare, drawn = replace(recipe, adapters=(), strengths=()), {}
    for way, own, shift in zip(WAYS, (bare, recipe, recipe), (0, 0, 1), strict=True):
        if shift and len(pairs) < 2:
            continue
        pipe = sampling_pipeline(own)
        draw = draw_pair(own, pipe, pairs, n, shift)
        images = [image for made in map_distributed(range(len(pairs)), draw) for image in made]
        drawn[way] = DrawnImages(images, [f"{pair.name}: {pair.caption}" for pair in pairs for _ in range(n)])
        del pipe  # its memory is the next one's
    return drawn


def draw_pair(
    recipe: Recipe, pipe: Any, pairs: Sequence[EditPair], n: int, shift: int
) -> Callable[[int], list[Image.Image]]:
    """A function that draws the images of one pair by its number. shift: how many pairs further its references are taken from."""

    def draw(number: int) -> list[Image.Image]:
        pair, references = pairs[number], pairs[(number + shift) % len(pairs)].references
        width, height = pair.target.size
        most = min(max_batch_size(max(width, height)), pipeline_family(pipe).max_images_at_once)
        made: list[Image.Image] = []
        while len(made) < n:
            count, first = min(most, n - len(made)), recipe.seed + number * n + len(made)
            images = denoise(
                pipe,
                [pair.caption] * count,
                seeds=range(first, first + count),
                steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                width=width,
                height=height,
                negative=[recipe.negative_prompt] * count,
                output_type="np",
                references=references,
            )
            check_finite(images)
            made += pipe.image_processor.numpy_to_pil(images)
        return made

    return draw


def pair_settings(
    recipe: Recipe, pairs: Sequence[EditPair], n: int, trained_on: int | None, scorers: Sequence[ImageScorer]
) -> dict[str, Any]:
    """What somebody would need to measure the same again. trained_on: how many pairs the adapter has learned from, where that is known."""
    return drawing_settings(recipe, scorers) | {
        "pairs": [pair.name for pair in pairs],
        "pairs_trained_on": trained_on,
        "pictures_a_pair": n,
    }
