"""What a tuned vision-language model can do and its base cannot, with controls that would show if it did not look.

Each row is asked of the base and of the tuned model. The tuned model is also asked with a blank picture and with another row's
picture: what it still gets right then it did not see. A retention set shows what was forgotten.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..pipelines.chat import answers, base_only, option_scores
from ..toolkit import scoring
from ..toolkit.data.instructions import Conversation, conversation, read_conversations, read_rows, references_of
from ..toolkit.data.pictures import Source, load_rgb
from ..toolkit.errors import UserError
from ..toolkit.models.vision import VisionModel
from ..toolkit.randomness import permutation
from ..toolkit.runs import write_text

SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's words
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question with its right answer."""

    asked: Conversation
    question: str
    """Its words, without the options."""
    kind: str
    """vqa, yesno or mcq."""
    references: tuple[str, ...]
    """Right answers; for mcq the letter."""
    options: tuple[str, ...]
    split: str
    """Such as POPE's random, popular and adversarial; '' when there is none."""
    cluster: str
    """What the picture is, by its content."""

    def read(self, text: str) -> str | None:
        """What was said, None when it cannot be read."""
        if self.kind == "yesno":
            return scoring.read_yesno(text)
        if self.kind == "mcq":
            return scoring.read_choice(text, self.options)
        return scoring.plain(text) or None

    def score(self, said: str | None) -> float:
        """0 to 1."""
        if said is None:
            return 0.0
        return scoring.vqa_score(said, self.references) if self.kind == "vqa" else float(said == self.references[0])


# ---------------------------------------------------------------------------------------------- reading


def read_items(file: Path, images: Path | None, *, ask_short: bool = False) -> list[Item]:
    """The questions of a file of {"image", "question", "answer" or "answers" or "choices" and "answer", "type", "split"}, or of any file
    of conversations, whose first questions are then asked. ask_short: with LLaVA's words for short answers behind.

    Raises:
        UserError: for a row that cannot be used.
    """
    if next((isinstance(row, dict) and "question" in row for _, row in read_rows(Path(file))), False):
        folder = Path(images or Path(file).parent)
        return [item_of(row, folder, place, ask_short) for place, row in read_rows(Path(file))]
    return [item_of_conversation(row, ask_short) for row in read_conversations(file, images).rows]


def item_of(row: Any, images: Path, place: str, ask_short: bool) -> Item:
    """One row of questions."""
    if not isinstance(row, dict) or "question" not in row:
        raise UserError(f"{place}: the row has no question.")
    references = references_of(row)
    if not references:
        raise UserError(f"{place}: the row has no answer.")
    options = tuple(str(option) for option in row.get("choices", ()))
    if len(options) > len(scoring.LETTERS):
        raise UserError(f"{place}: {len(options)} choices are more than the {len(scoring.LETTERS)} that have letters.")
    polar = {answer.strip(" .").lower() for answer in references}
    kind = str(row.get("type") or ("mcq" if options else "yesno" if polar <= {"yes", "no"} else "vqa"))
    if kind not in ("vqa", "yesno", "mcq"):
        raise UserError(f"{place}: the type '{kind}' is none of vqa, yesno, mcq.")
    if kind == "mcq":
        references = [letter_of(references[0], options, place)]
    elif kind == "yesno":
        if not polar <= {"yes", "no"}:
            raise UserError(
                f"{place}: the answer to a question of type yesno must be yes or no, not '{references[0]}'."
            )
        references = [Counter(answer.strip(" .").lower() for answer in references).most_common(1)[0][0]]
    question = str(row["question"])
    try:
        given = {key: row[key] for key in ("image", "images") if key in row}
        words = question_text(question, kind, options, ask_short)
        asked = conversation(given | {"question": words, "answer": references[0]}, images, place).until(1)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    split = str(row.get("split", row.get("category", "")))
    return Item(asked, question, kind, tuple(references), options, split, cluster_of(asked))


def item_of_conversation(row: Conversation, ask_short: bool) -> Item:
    """The first question of a conversation."""
    start = row.messages[0]["role"] == "system"
    asked = row.until(1 + start)
    answer = " ".join(part["text"] for part in row.messages[1 + start]["content"])
    kind = "yesno" if answer.strip(" .").lower() in ("yes", "no") else "vqa"
    if ask_short:
        message = asked.messages[-1]
        more = {"role": "user", "content": [*message["content"], {"type": "text", "text": SHORT}]}
        asked = replace(asked, messages=(*asked.messages[:-1], more))
    answer = answer.strip(" .").lower() if kind == "yesno" else answer
    words = " ".join(part["text"] for part in asked.messages[-1]["content"] if part["type"] == "text")
    return Item(asked, words, kind, (answer,), (), "", cluster_of(asked))


def question_text(question: str, kind: str, options: Sequence[str], ask_short: bool) -> str:
    """The words that are put to the model."""
    if kind == "mcq":
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(scoring.LETTERS, options, strict=False))
        return f"{question}\n{listed}\n{LETTER}"
    return f"{question}\n{SHORT}" if ask_short else question


def letter_of(answer: str, options: Sequence[str], place: str) -> str:
    """The letter of the right option, given as letter, or as its text."""
    letters = scoring.LETTERS[: len(options)]
    if answer in options:
        return letters[options.index(answer)]
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    raise UserError(f"{place}: the answer '{answer}' is none of the choices.")


def cluster_of(row: Conversation) -> str:
    """The row's pictures by their content; a row without one is its own cluster."""
    if not row.pictures:
        return row.place
    return hashlib.sha256(b"".join(content(picture) for picture in row.pictures)).hexdigest()


def content(picture: Source) -> bytes:
    """A picture's bytes."""
    return picture.read_bytes() if isinstance(picture, Path) else picture


# ---------------------------------------------------------------------------------------------- asking


@dataclass
class Asked:
    """What a model said to every item."""

    texts: list[str]
    read: list[str | None]
    scores: list[float]
    likeliest: list[float | None]
    """Score of the likeliest option, for kinds that have options."""


def ask(vision: VisionModel, items: Sequence[Item], *, max_new_tokens: int, likelihood: bool) -> Asked:
    """Asks every item, greedily; with `likelihood` also which option is likeliest."""
    texts = answers(vision, [item.asked for item in items], max_new_tokens=max_new_tokens)
    read = [item.read(text) for item, text in zip(items, texts, strict=True)]
    scores = [item.score(said) for item, said in zip(items, read, strict=True)]
    likeliest = [likeliest_score(vision, item) if likelihood else None for item in items]
    return Asked(texts, read, scores, likeliest)


def likeliest_score(vision: VisionModel, item: Item) -> float | None:
    """Whether the likeliest option is the right one: what the model knows, whatever way it puts it."""
    if item.kind == "vqa":
        return None
    options = ["yes", "no"] if item.kind == "yesno" else list(scoring.LETTERS[: len(item.options)])
    scores = option_scores(vision, item.asked, options)
    return item.score(options[scores.index(max(scores))])


def with_pictures(items: Sequence[Item], change: Callable[[int], Sequence[Source]]) -> list[Item]:
    """The items with other pictures."""
    return [replace(item, asked=replace(item.asked, pictures=tuple(change(n)))) for n, item in enumerate(items)]


def blank(items: Sequence[Item]) -> list[Item]:
    """The items with grey pictures of the same sizes."""

    def grey(picture: Source) -> bytes:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", load_rgb(picture).size, (128, 128, 128)).save(buffer, format="png")
        return buffer.getvalue()

    return with_pictures(items, lambda n: [grey(picture) for picture in items[n].asked.pictures])


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items with the pictures of another item that has as many; an item whose like is nowhere keeps its own."""
    others: dict[int, list[int]] = {}
    for number, item in enumerate(items):
        others.setdefault(len(item.asked.pictures), []).append(number)
    source = list(range(len(items)))
    for group in others.values():
        mixed = [group[i] for i in permutation(seed, len(group), 0)]
        for at, number in enumerate(mixed):
            turn = [mixed[(at + step) % len(mixed)] for step in range(1, len(mixed))]
            source[number] = next((n for n in turn if items[n].cluster != items[number].cluster), number)
    return with_pictures(items, lambda n: items[source[n]].asked.pictures)


# ---------------------------------------------------------------------------------------------- the figures


def evaluate(
    vision: VisionModel,
    items: Sequence[Item],
    *,
    retention: Sequence[Item] = (),
    max_new_tokens: int = 32,
    seed: int = 0,
    likelihood: bool = True,
) -> dict[str, Any]:
    """All figures of a tuned model on `items`, and what it forgot of `retention`; `rows` has every answer.

    The base is the same model with its adapters off.
    """
    vision.model.eval()
    put = {"max_new_tokens": max_new_tokens, "likelihood": likelihood}
    tuned = ask(vision, items, **put)
    with base_only(vision):
        base = ask(vision, items, **put)
    seen = any(item.asked.pictures for item in items)
    controls = {"blank picture": blank(items), "another row's picture": shuffled(items, seed)} if seen else {}
    clusters = [item.cluster for item in items]
    figures: dict[str, Any] = {
        "tuned": figures_of(tuned, items),
        "base": figures_of(base, items),
        "compared": compared(base, tuned, clusters),
        "controls": {},
        "settings": {
            "rows": len(items),
            "pictures": len(set(clusters)),
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "dtype": str(vision.dtype),
            "seed": seed,
        },
    }
    answer, score = scoring.majority(
        [item.references[0] for item in items], lambda said, n: items[n].score(items[n].read(said))
    )
    figures["controls"]["commonest answer"] = {"answer": answer, "mean": score}
    for name, others in controls.items():
        other = ask(vision, others, max_new_tokens=max_new_tokens, likelihood=False)
        figures["controls"][name] = scoring.share(other.scores, clusters)
        gain = [a - b for a, b in zip(tuned.scores, other.scores, strict=True)]
        word, low, high = scoring.verdict(gain, clusters)
        seen = {"mean": sum(gain) / len(gain), "low": low, "high": high, "it_looks": word == "improved"}
        figures["controls"][name]["seen"] = seen
    if retention:
        figures["retention"] = retained(vision, retention, max_new_tokens)
    figures["rows"] = [answer_row(item, n, tuned, base) for n, item in enumerate(items)]
    return figures


def answer_row(item: Item, number: int, tuned: Asked, base: Asked) -> dict[str, Any]:
    """What both models said to an item."""
    facts = {"place": item.asked.place, "kind": item.kind, "split": item.split, "right": item.references[0]}
    said = {"tuned": tuned.texts[number], "base": base.texts[number]}
    return facts | said | {"score": tuned.scores[number], "base_score": base.scores[number]}


def retained(vision: VisionModel, items: Sequence[Item], max_new_tokens: int) -> dict[str, Any]:
    """What is left of old tasks."""
    put = {"max_new_tokens": max_new_tokens, "likelihood": False}
    tuned = ask(vision, items, **put)
    with base_only(vision):
        base = ask(vision, items, **put)
    clusters = [item.cluster for item in items]
    splits = sorted({item.split for item in items})
    own = {split: [n for n, item in enumerate(items) if item.split == split] for split in splits if split}
    mean = lambda asked, rows: sum(asked.scores[n] for n in rows) / len(rows)  # noqa: E731
    return {
        "tuned": scoring.share(tuned.scores, clusters),
        "base": scoring.share(base.scores, clusters),
        "compared": compared(base, tuned, clusters),
        "splits": {split: {"base": mean(base, rows), "tuned": mean(tuned, rows)} for split, rows in own.items()},
    }


def figures_of(asked: Asked, items: Sequence[Item]) -> dict[str, Any]:
    """One model's figures: in all, by split, for yes and no, and by likelihood."""
    clusters = [item.cluster for item in items]
    figures: dict[str, Any] = {"accuracy": scoring.share(asked.scores, clusters)}
    figures["unparsed"] = sum(said is None for said in asked.read)
    if any(score is not None for score in asked.likeliest):
        pairs = [(score, c) for score, c in zip(asked.likeliest, clusters, strict=True) if score is not None]
        figures["by_likelihood"] = scoring.share([s for s, _ in pairs], [c for _, c in pairs])
    groups = {
        split: [n for n, item in enumerate(items) if item.split == split] for split in sorted({i.split for i in items})
    }
    if len(groups) > 1:
        figures["splits"] = {
            split: scoring.share([asked.scores[n] for n in rows], [clusters[n] for n in rows])
            for split, rows in groups.items()
        }
        figures["mean_of_splits"] = sum(one["mean"] for one in figures["splits"].values()) / len(groups)
    polar = [n for n, item in enumerate(items) if item.kind == "yesno"]
    if polar:
        figures["yes_no"] = scoring.yes_no_figures(
            [asked.read[n] for n in polar], [items[n].references[0] for n in polar]
        )
    return figures


def compared(base: Asked, tuned: Asked, clusters: Sequence[str]) -> dict[str, Any]:
    """Two models on the same rows."""
    gain = [a - b for a, b in zip(tuned.scores, base.scores, strict=True)]
    word, low, high = scoring.verdict(gain, clusters)
    gained, lost = sum(g > 0 for g in gain), sum(g < 0 for g in gain)
    return {
        "verdict": word,
        "difference": sum(gain) / len(gain),
        "low": low,
        "high": high,
        "gained": gained,
        "lost": lost,
        "mcnemar_p": scoring.mcnemar(gained, lost),
    }


def leaked(items: Sequence[Item], training: Sequence[Conversation]) -> int:
    """Items whose pictures were trained on."""
    known = {hashlib.sha256(content(picture)).hexdigest() for row in training for picture in row.pictures}
    return sum(any(hashlib.sha256(content(p)).hexdigest() in known for p in item.asked.pictures) for item in items)


# ---------------------------------------------------------------------------------------------- in words


def report(figures: dict[str, Any]) -> str:
    """The figures for people."""
    tuned, base, both = figures["tuned"], figures["base"], figures["compared"]
    lines = [
        f"{'':28} accuracy  95 % interval     rows  unparsed",
        line("base", base["accuracy"], base["unparsed"]),
        line("tuned", tuned["accuracy"], tuned["unparsed"]),
    ]
    for name in ("base", "tuned"):
        if "by_likelihood" in figures[name]:
            lines.append(line(f"{name}, likeliest option", figures[name]["by_likelihood"]))
    for split, own in tuned.get("splits", {}).items():
        lines.append(line(f"tuned, {split or 'no split'}", own))
    if "yes_no" in tuned:
        own = tuned["yes_no"]
        lines.append(
            f"yes or no: F1 {own['f1']:.3f}, precision {own['precision']:.3f}, recall {own['recall']:.3f}; "
            f"says yes to {own['yes_rate']:.0%}, right would be {own['yes_rate_of_the_truth']:.0%}"
        )
    lines.append(
        f"tuned against base, same rows: {both['verdict']} ({both['difference']:+.3f}, {both['low']:+.3f} to {both['high']:+.3f}; "
        f"{both['gained']} rows gained, {both['lost']} lost, McNemar p {both['mcnemar_p']:.2g})"
    )
    for name, own in figures["controls"].items():
        if name == "commonest answer":
            lines.append(f"always '{own['answer']}' would score {own['mean']:.3f}")
            continue
        lines.append(line(f"tuned, {name}", own))
        seen = own["seen"]
        word = "it looks" if seen["it_looks"] else "no sign that it looks"
        lines.append(
            f"{'':28} with the right picture {seen['mean']:+.3f} ({seen['low']:+.3f} to {seen['high']:+.3f}): {word}"
        )
    if "retention" in figures:
        kept = figures["retention"]
        lines += [line("old tasks, base", kept["base"]), line("old tasks, tuned", kept["tuned"])]
        lines.append(f"old tasks: {kept['compared']['verdict']} ({kept['compared']['difference']:+.3f})")
        for split, own in kept["splits"].items():
            lines.append(f"  {split:26} {own['base']:.3f} -> {own['tuned']:.3f}")
    if "leaked" in figures:
        lines.append(f"{figures['leaked']} rows show a picture that was trained on")
    return "\n".join(lines)


def line(name: str, own: dict[str, Any], unparsed: int | None = None) -> str:
    """One share."""
    more = "" if unparsed is None else f"  {unparsed:8}"
    return f"{name:28} {own['mean']:8.3f}  {own['low']:.3f} to {own['high']:.3f}  {own['rows']:7}{more}"


def write_figures(out: Path, figures: dict[str, Any]) -> Path:
    """evaluation.json, and answers.jsonl with every answer."""
    rows = figures.pop("rows")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(out / "evaluation.json", json.dumps(figures, indent=1, ensure_ascii=False))
    return out / "evaluation.json"


def write_vlmevalkit(items: Sequence[Item], path: Path) -> Path:
    """The items as a table that VLMEvalKit reads (tab-separated, pictures in base64).

    Raises:
        UserError: for a row without exactly one picture, which its tables do not have.
    """
    import base64
    import csv
    import io

    buffer = io.StringIO()
    most = max(len(item.options) for item in items)
    table = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    table.writerow(["index", "image", "question", *scoring.LETTERS[:most], "answer", "category"])
    for number, item in enumerate(items):
        if len(item.asked.pictures) != 1:
            raise UserError(
                f"{item.asked.place}: VLMEvalKit's tables hold one picture a row, not {len(item.asked.pictures)}."
            )
        picture = base64.b64encode(content(item.asked.pictures[0])).decode()
        options = [*item.options, *[""] * (most - len(item.options))]
        table.writerow([number, picture, item.question, *options, item.references[0], item.split])
    write_text(path, buffer.getvalue())
    return path
