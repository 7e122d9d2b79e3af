"""What a tuned vision-language model can do and its base cannot, with controls that would show if it did not look.

Each row is asked of the base and of the tuned model. The tuned model is also asked with a blank image and with another row's
image: what it still gets right then it did not see. A retention set shows what was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from ...pipelines.chat import base_model_only, option_scores, whole_answers
from ...toolkit.data.image_checks import check_image
from ...toolkit.data.images import image_size
from ...toolkit.data.videos import Video
from ...toolkit.metrics import answers as scoring
from ...toolkit.metrics import statistics
from ...toolkit.vlm.model import VisionLanguageModel
from ..engine.processes import map_distributed
from .items import Item, blank_images, box_numbers, first_image, shuffle_frames, shuffle_images

BATCH_SIZE = 16  # rows
SHORTEST_LIMIT = 32  # tokens that every answer may take
ROOM_FOR_THOUGHTS = 1024  # tokens more, where the chat template opens a thought


@dataclass
class ModelAnswers:
    """What a model said to every item."""

    texts: list[str]
    read: list[str | None]
    scores: list[float]
    likeliest: list[float | None]
    """Score of the likeliest option, for kinds that have options."""
    cut: list[bool] = field(default_factory=list)
    """Whether the limit of tokens was reached before the answer came to its end."""


def ask_items(
    vision: VisionLanguageModel, items: Sequence[Item], *, max_new_tokens: int, likelihood: bool
) -> ModelAnswers:
    """Asks every item, greedily, in shares; with `likelihood` also which option is likeliest."""
    batches = [
        [item.conversation for item in items[start : start + BATCH_SIZE]] for start in range(0, len(items), BATCH_SIZE)
    ]
    said = map_distributed(
        batches, lambda rows: whole_answers(vision, rows, max_new_tokens=max_new_tokens, batch=BATCH_SIZE)
    )
    texts, cut = [one.text for batch in said for one in batch], [one.cut for batch in said for one in batch]
    read = [item.parse_answer(item.place(text, vision)) for item, text in zip(items, texts, strict=True)]
    scores = [item.score(own) for item, own in zip(items, read, strict=True)]
    likeliest = map_distributed(items, lambda item: likeliest_score(vision, item) if likelihood else None)
    return ModelAnswers(texts, read, scores, likeliest, cut)


def answer_limit(vision: VisionLanguageModel, items: Sequence[Item]) -> int:
    """Tokens that the longest right answer takes, with room for an end and for other words; more where the base thinks before it."""
    tokenizer = vision.processor.tokenizer
    texts = {text for item in items for text in (*item.references, *item.options)}
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return max(SHORTEST_LIMIT, longest + longest // 4 + 8) + (
        ROOM_FOR_THOUGHTS if vision.chat.template.by_prompt else 0
    )


def likeliest_score(vision: VisionLanguageModel, item: Item) -> float | None:
    """Whether the likeliest option is the right one: what the model knows, whatever way it puts it."""
    if item.kind in ("vqa", "box"):
        return None
    options = ["yes", "no"] if item.kind == "yesno" else list(scoring.LETTERS[: len(item.options)])
    scores = option_scores(vision, item.conversation, options)
    return item.score(options[scores.index(max(scores))])


# ---------------------------------------------------------------------------------------------- the figures


def evaluate(
    vision: VisionLanguageModel,
    items: Sequence[Item],
    *,
    retention: Sequence[Item] = (),
    max_new_tokens: int | None = None,
    seed: int = 0,
    likelihood: bool = True,
) -> dict[str, Any]:
    """All figures of a tuned model on `items`, and what it forgot of `retention`; `rows` has every answer.

    The base is the same model with its adapters off. max_new_tokens: None is by the longest right answer, see `answer_limit`.
    """
    vision.model.eval()
    items, retention = (choose_frames(vision, some) for some in (items, retention))
    max_new_tokens = max_new_tokens or answer_limit(vision, [*items, *retention])
    base, tuned = ask_base_and_tuned(vision, items, max_new_tokens=max_new_tokens, likelihood=likelihood)
    clusters = [item.cluster for item in items]
    figures: dict[str, Any] = {
        "tuned": compute_metrics(tuned, items),
        "base": compute_metrics(base, items),
        "compared": compare_models(base, tuned, clusters),
        "controls": control_metrics(vision, items, tuned, max_new_tokens, seed),
        "settings": {
            "rows": len(items),
            "pictures": len(set(clusters)),
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "dtype": str(vision.dtype),
            "seed": seed,
        },
    }
    if retention:
        figures["retention"] = retention_metrics(vision, retention, max_new_tokens)
    figures["rows"] = [answer_row(item, n, tuned, base) for n, item in enumerate(items)]
    return figures


def choose_frames(vision: VisionLanguageModel, items: Sequence[Item]) -> list[Item]:
    """The items with the frames of their videos chosen, so that their controls show as many."""
    rows = [item.conversation for item in items]
    videos = {medium: check_image(medium) for row in rows for medium in row.images if isinstance(medium, Video)}
    return [replace(item, conversation=vision.chat.choose_frames(item.conversation, videos)) for item in items]


def ask_base_and_tuned(
    vision: VisionLanguageModel, items: Sequence[Item], *, max_new_tokens: int, likelihood: bool
) -> tuple[ModelAnswers, ModelAnswers]:
    """What the base says, and what the tuned model says."""
    tuned = ask_items(vision, items, max_new_tokens=max_new_tokens, likelihood=likelihood)
    with base_model_only(vision):
        base = ask_items(vision, items, max_new_tokens=max_new_tokens, likelihood=likelihood)
    return base, tuned


def control_metrics(
    vision: VisionLanguageModel, items: Sequence[Item], tuned: ModelAnswers, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """What is right without looking: the commonest answer, and the tuned model's with blank, other and reordered ones."""
    found: dict[str, Any] = {"commonest answer": constant_answer(items)}
    if not any(item.conversation.images for item in items):
        return found
    clusters = [item.cluster for item in items]
    controls = {"blank image": blank_images(items), "another row's image": shuffle_images(items, seed)}
    if any(isinstance(medium, Video) for item in items for medium in item.conversation.images):
        controls["frames in another order"] = shuffle_frames(items, seed)
    for name, others in controls.items():
        other = ask_items(vision, others, max_new_tokens=max_new_tokens, likelihood=False)
        gain = [a - b for a, b in zip(tuned.scores, other.scores, strict=True)]
        word, low, high = statistics.verdict(gain, clusters)
        seen = {"mean": sum(gain) / len(gain), "low": low, "high": high, "it_looks": word == "improved"}
        seen["cut"] = sum(tuned.cut) + sum(other.cut)
        found[name] = statistics.mean_with_interval(other.scores, clusters) | {"seen": seen}
        if ious := box_overlaps(other, items):
            found[name]["iou"] = fmean(ious)
    return found


def constant_answer(items: Sequence[Item]) -> dict[str, Any]:
    """What one answer to all questions scores: the commonest, or where boxes are asked for the box in the middle of the right ones."""
    if not all(item.kind == "box" and len(box_numbers(item.references[0])) == 4 for item in items):
        right = [item.references[0] for item in items]
        answer, score = scoring.majority_baseline(right, lambda said, n: items[n].score(items[n].parse_answer(said)))
        return {"answer": answer, "mean": score}
    sizes = [image_size(first_image(item.conversation)) for item in items]
    shares = [
        [number / size[at % 2] for at, number in enumerate(box_numbers(item.references[0]))]
        for item, size in zip(items, sizes, strict=True)
    ]
    middle = [median(column) for column in zip(*shares, strict=True)]
    said = [" ".join(f"{share * size[at % 2]:.2f}" for at, share in enumerate(middle)) for size in sizes]
    pairs = list(zip(items, said, strict=True))
    return {
        "answer": f"the median box ({', '.join(f'{share:.2f}' for share in middle)} of width and height)",
        "mean": fmean(item.score(box) for item, box in pairs),
        "iou": fmean(item.iou(box) for item, box in pairs),
    }


def box_overlaps(asked: ModelAnswers, items: Sequence[Item]) -> list[float]:
    """Intersection over union of each box that was asked for."""
    pairs = zip(items, asked.read, strict=True)
    return [item.iou(said) if said else 0.0 for item, said in pairs if item.kind == "box"]


def answer_row(item: Item, number: int, tuned: ModelAnswers, base: ModelAnswers) -> dict[str, Any]:
    """What both models said to an item."""
    facts = {"place": item.conversation.location, "kind": item.kind, "split": item.split, "right": item.references[0]}
    said: dict[str, Any] = {"tuned": tuned.texts[number], "base": base.texts[number]}
    if tuned.cut and (tuned.cut[number] or base.cut[number]):
        said["cut"] = [name for name, own in (("tuned", tuned), ("base", base)) if own.cut[number]]
    return facts | said | {"score": tuned.scores[number], "base_score": base.scores[number]}


def retention_metrics(vision: VisionLanguageModel, items: Sequence[Item], max_new_tokens: int) -> dict[str, Any]:
    """What is left of old tasks."""
    base, tuned = ask_base_and_tuned(vision, items, max_new_tokens=max_new_tokens, likelihood=False)
    clusters = [item.cluster for item in items]
    splits = sorted({item.split for item in items})
    own = {split: [n for n, item in enumerate(items) if item.split == split] for split in splits if split}
    mean = lambda asked, rows: sum(asked.scores[n] for n in rows) / len(rows)  # noqa: E731
    return {
        "tuned": statistics.mean_with_interval(tuned.scores, clusters),
        "base": statistics.mean_with_interval(base.scores, clusters),
        "compared": compare_models(base, tuned, clusters),
        "cut": sum(base.cut) + sum(tuned.cut),
        "splits": {split: {"base": mean(base, rows), "tuned": mean(tuned, rows)} for split, rows in own.items()},
    }


def compute_metrics(asked: ModelAnswers, items: Sequence[Item]) -> dict[str, Any]:
    """One model's figures: in all, by split, for yes and no, and by likelihood."""
    clusters = [item.cluster for item in items]
    figures: dict[str, Any] = {"accuracy": statistics.mean_with_interval(asked.scores, clusters)}
    figures["unparsed"] = sum(said is None for said in asked.read)
    figures["cut"] = sum(asked.cut)
    if any(score is not None for score in asked.likeliest):
        pairs = [(score, c) for score, c in zip(asked.likeliest, clusters, strict=True) if score is not None]
        figures["by_likelihood"] = statistics.mean_with_interval([s for s, _ in pairs], [c for _, c in pairs])
    groups = {
        split: [n for n, item in enumerate(items) if item.split == split] for split in sorted({i.split for i in items})
    }
    if len(groups) > 1:
        figures["splits"] = {
            split: statistics.mean_with_interval([asked.scores[n] for n in rows], [clusters[n] for n in rows])
            for split, rows in groups.items()
        }
        figures["mean_of_splits"] = sum(one["mean"] for one in figures["splits"].values()) / len(groups)
    polar = [n for n, item in enumerate(items) if item.kind == "yesno"]
    if polar:
        figures["yes_no"] = scoring.yes_no_metrics(
            [asked.read[n] for n in polar], [items[n].references[0] for n in polar]
        )
    boxed = [n for n, item in enumerate(items) if item.kind == "box"]
    if boxed:
        figures["iou"] = statistics.mean_with_interval(box_overlaps(asked, items), [clusters[n] for n in boxed])
    return figures


def compare_models(base: ModelAnswers, tuned: ModelAnswers, clusters: Sequence[str]) -> dict[str, Any]:
    """Two models on the same rows."""
    gain = [a - b for a, b in zip(tuned.scores, base.scores, strict=True)]
    word, low, high = statistics.verdict(gain, clusters)
    gained, lost = sum(g > 0 for g in gain), sum(g < 0 for g in gain)
    return {
        "verdict": word,
        "difference": sum(gain) / len(gain),
        "low": low,
        "high": high,
        "gained": gained,
        "lost": lost,
        "mcnemar_p": statistics.mcnemar_p(gained, lost),
    }
