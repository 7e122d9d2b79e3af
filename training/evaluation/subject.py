"""What an adapter of a subject is worth, by DreamBooth's protocol (Ruiz et al. 2022, arXiv 2208.12242) and with what it leaves out.

Every prompt is drawn with the adapter and without it, from the same seeds. Likeness is the mean cosine with photos of the subject,
which should not be those it was trained on; prompt fidelity is the cosine with the prompt without the rare token. Beside these: what
unrelated prompts lost (drift), how much of the subject is in its class (leak), whether images are all alike (diversity) or copies of
the training photos. Intervals are bootstraps in which whole prompts are drawn, 95 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...pipelines.generate import (
    Recipe,
    check_finite,
    denoise,
    max_batch_size,
    native_resolution,
    sampling_pipeline,
)
from ...toolkit.core.errors import UserError
from ...toolkit.core.paths import assets_folder
from ...toolkit.core.texts import read_lines
from ...toolkit.data.images import load_rgb
from ...toolkit.metrics import clip as metrics
from ...toolkit.metrics import statistics
from ...toolkit.metrics.clip import ClipScorer
from ...toolkit.metrics.dino import ImageScorer
from ..engine.processes import map_distributed

SHIPPED_PROMPTS = ("object", "live", "world")  # prompts in assets/prompts


@dataclass(frozen=True)
class SubjectTest:
    """What is asked."""

    prompts: tuple[str, ...]
    """With {token} and {noun}."""
    unrelated: tuple[str, ...]
    token: str
    noun: str
    n: int = 4
    """Images per prompt."""

    def texts(self, *, token: bool) -> list[str]:
        """The prompts, with the rare token or without."""
        words = self.token if token else ""
        return [" ".join(text.format(token=words, noun=self.noun).split()) for text in self.prompts]


@dataclass
class DrawnImages:
    """Images of all prompts, `n` each, and the prompt of each."""

    images: list[Image.Image]
    prompts: list[str]


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a file, one per line, or of those that ship: object, live (the protocol's 25 each), world (the embedded models').

    Raises:
        UserError: for a file that is not there, is empty, or has a line without {token} and {noun}.
    """
    file = prompt_file(name) if name in SHIPPED_PROMPTS else Path(name)
    try:
        lines = [line.strip() for line in read_lines(file) if line.strip()]
    except OSError as error:
        raise UserError(f"--prompts {name} is neither a file nor one of {', '.join(SHIPPED_PROMPTS)}.") from error
    if not lines:
        raise UserError(
            f"--prompts {name} is empty: write one prompt per line, such as 'a {{token}} {{noun}} in the snow'."
        )
    for number, line in enumerate(lines, 1):
        try:
            line.format(token="", noun="")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"--prompts {name}, line {number}: the only placeholders are {{token}} and {{noun}}."
            ) from error
        if "{token}" not in line or "{noun}" not in line:
            raise UserError(f"--prompts {name}, line {number}: needs both {{token}} and {{noun}}.")
    return tuple(lines)


def prompt_file(name: str) -> Path:
    """A file of prompts that ships with rankfold."""
    return assets_folder() / "prompts" / f"{name}.txt"


def unrelated_prompts(prompts: str) -> tuple[str, ...]:
    """Prompts that have nothing to do with a subject, in the world of the base."""
    return tuple(
        prompt_file("world-unrelated" if prompts == "world" else "unrelated").read_text(encoding="utf-8").splitlines()
    )


def draw(recipe: Recipe, texts: Sequence[str], n: int, pipe: Any) -> DrawnImages:
    """`n` images per text, each from a seed of its own; texts share batches, divided among processes."""
    prompts = [text for text in texts for _ in range(n)]
    width = recipe.width or native_resolution(pipe)

    def batch(start: int) -> list[Image.Image]:
        asked = prompts[start : start + max_batch_size(width)]
        images = denoise(
            pipe,
            asked,
            seeds=range(recipe.seed + start, recipe.seed + start + len(asked)),
            steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            width=width,
            height=recipe.height,
            negative=[recipe.negative_prompt] * len(asked),
            output_type="np",
        )
        check_finite(images)
        return pipe.image_processor.numpy_to_pil(images)

    batches = map_distributed(range(0, len(prompts), max_batch_size(width)), batch)
    return DrawnImages([image for images in batches for image in images], prompts)


def evaluate_subject(
    recipe: Recipe,
    test: SubjectTest,
    references: Sequence[Path],
    trained_on: Sequence[Path],
    clip: ClipScorer,
    others: Sequence[ImageScorer] = (),
) -> tuple[dict[str, Any], dict[str, DrawnImages]]:
    """All figures of the recipe's adapters, and the images they were measured on.

    references: photos of the subject, at least two; trained_on: those it learned from, [] when unknown. others: backbones for likeness
    beside CLIP.
    """
    if len(references) < 2:
        raise UserError("--images holds fewer than two photos, so there is nothing to compare them with: add some.")
    photos = [load_rgb(path) for path in references]
    drawn = draw_all(recipe, test)
    figures: dict[str, Any] = {"settings": evaluation_settings(recipe, test, references, trained_on, [clip, *others])}
    for scorer in (clip, *others):
        real = scorer.embed_images(photos)
        figures[f"likeness, {scorer.name}"] = likeness_metrics(scorer, real, drawn)
    own = {name: clip.embed_images(some.images) for name, some in drawn.items()}
    wanted = clip.embed_texts([text for text in test.texts(token=False) for _ in range(test.n)])
    for name in ("base", "tuned"):
        figures.setdefault("prompt fidelity", {})[name] = mean_with_interval(
            metrics.clip_t(own[name], wanted), drawn[name].prompts
        )
        moved = [metrics.diversity(own[name][at : at + test.n]) for at in range(0, len(own[name]), test.n)]
        figures.setdefault("diversity", {})[name] = mean_with_interval(torch.cat(moved), drawn[name].prompts)
    away = metrics.drift(own["unrelated, base"], own["unrelated, tuned"])
    figures["drift on unrelated prompts"] = {"tuned": mean_with_interval(away, drawn["unrelated, tuned"].prompts)}
    if trained_on:
        figures["copies"] = copy_metrics(
            clip, own["tuned"], [load_rgb(path) for path in trained_on], drawn["tuned"].prompts
        )
    return figures, drawn


def draw_all(recipe: Recipe, test: SubjectTest) -> dict[str, DrawnImages]:
    """Images of all prompts by base and tuned model."""
    drawn = {}
    bare = replace(recipe, adapters=(), strengths=())
    for name, own in (("base", bare), ("tuned", recipe)):
        pipe = sampling_pipeline(own)
        drawn[name] = draw(own, test.texts(token=True), test.n, pipe)
        drawn[f"class, {name}"] = draw(own, test.texts(token=False), test.n, pipe)
        drawn[f"unrelated, {name}"] = draw(own, test.unrelated, test.n, pipe)
        del pipe  # its memory is the next one's
    return drawn


def likeness_metrics(scorer: ImageScorer, real_ND: torch.Tensor, drawn: dict[str, DrawnImages]) -> dict[str, Any]:
    """Mean cosine with the photos: of real ones, of the base's and the tuned model's images, with the token and without.

    closed and leak: how much of the way from the base's images to real photos the tuned model's go, with the token and without.
    """
    figures: dict[str, Any] = {"real": float(metrics.leave_one_out_similarity(real_ND).mean())}
    for name in ("base", "tuned", "class, base", "class, tuned"):
        figures[name] = mean_with_interval(
            metrics.clip_i(scorer.embed_images(drawn[name].images), real_ND), drawn[name].prompts
        )
    for name, before, after in (("closed", "base", "tuned"), ("leak", "class, base", "class, tuned")):
        way = figures["real"] - figures[before]["mean"]
        figures[name] = (figures[after]["mean"] - figures[before]["mean"]) / way if way > 0 else None
    return figures


def copy_metrics(
    clip: ClipScorer, images_ND: torch.Tensor, photos: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, Any]:
    """How near images come to the photos that were trained on. copied: the share that is nearer to one than any two photos are."""
    known = clip.embed_images(photos)
    near = metrics.nearest_similarity(images_ND, known)
    figures: dict[str, Any] = {"nearest training photo": mean_with_interval(near, prompts)}
    if len(known) > 1:
        alike = known @ known.T - 2 * torch.eye(len(known))
        figures["copied"] = mean_with_interval((near > alike.max()).float(), prompts)
    return figures


def mean_with_interval(values_N: torch.Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """A mean with its interval over prompts."""
    low, high = statistics.cluster_interval(values_N.tolist(), list(prompts))
    return {"mean": float(values_N.mean()), "low": low, "high": high, "pictures": len(values_N)}


def evaluation_settings(
    recipe: Recipe,
    test: SubjectTest,
    references: Sequence[Path],
    trained_on: Sequence[Path],
    scorers: Sequence[ImageScorer],
) -> dict[str, Any]:
    """What somebody would need to measure the same again."""
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in trained_on}
    seen = sum(hashlib.sha256(path.read_bytes()).hexdigest() in hashes for path in references)
    return drawing_settings(recipe, scorers) | {
        "prompts": list(test.prompts),
        "pictures_a_prompt": test.n,
        "token": test.token,
        "noun": test.noun,
        "references": len(references),
        "references_trained_on": seen if trained_on else None,
    }


def drawing_settings(recipe: Recipe, scorers: Sequence[ImageScorer]) -> dict[str, Any]:
    """What images were drawn with, and what they were measured by."""
    return {
        "base": recipe.base,
        "adapters": list(recipe.adapters),
        "strengths": list(recipe.strengths),
        "seed": recipe.seed,
        "precision": recipe.precision,
        "steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
        "backbones": [scorer.name for scorer in scorers],
    }
