"""Answers read strictly and counted honestly: what a model said, whether it is right, and how sure one can be of a share.

Three kinds of questions: short answers (vqa), yes or no (yesno), multiple choice (mcq). What cannot be read is unparsed, counts as
wrong, and is shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from .statistics import safe_ratio

LETTERS = "ABCDEFGHIJ"
NUMBERS = {
    w: str(n)
    for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
ARTICLES = {"a", "an", "the"}


# ---------------------------------------------------------------------------------------------- reading


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits: answers that are alike for people become alike."""
    words = re.sub(r"[^\w\s']", " ", text.lower()).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def read_yesno(text: str) -> str | None:
    """'yes' or 'no' when exactly one of the two words is in the first sentence; None otherwise."""
    first = re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0].lower()
    found = {word for word in re.findall(r"[a-z]+", first) if word in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter of the chosen option: 'B', 'B.', '(B)', 'B: ...', 'The answer is B', or an option's own text; None otherwise."""
    known = dict(zip(LETTERS, options, strict=False))
    letters, text = "".join(known), text.strip()
    same = [letter for letter, option in known.items() if normalize_or_keep(option) == normalize_or_keep(text)]
    if len(same) == 1:
        return same[0]
    if match := re.fullmatch(rf"(?i:the answer is|answer:)\s*\(?([{letters}])\)?\.?", text):
        return match.group(1)
    match = re.fullmatch(rf"\(?([{letters}])\)?(?:[.:),](.*))?", text, flags=re.DOTALL)
    if match is None:
        return None
    letter, rest = match.group(1), (match.group(2) or "").strip()
    others = set(re.findall(rf"\b([{letters}])\b", rest)) - {letter}
    return None if others and normalize_or_keep(rest) != normalize_or_keep(known[letter]) else letter


def normalize_or_keep(text: str) -> str:
    """The text normalised, or as it is when nothing would be left of it (a letter, a sign)."""
    return normalize_answer(text) or text.strip().lower()


def vqa_score(said: str, answers: Sequence[str]) -> float:
    """Right or wrong for up to three references; for more the soft accuracy of VQAv2: min(1, matches / 3), one left out in turn."""
    said, known = normalize_or_keep(said), [normalize_or_keep(answer) for answer in answers]
    if len(known) < 4:
        return float(said in known)
    turns = [min(1.0, sum(said == k for n, k in enumerate(known) if n != left) / 3) for left in range(len(known))]
    return sum(turns) / len(turns)


# ---------------------------------------------------------------------------------------------- counting


def yes_no_metrics(said: Sequence[str | None], right: Sequence[str]) -> dict[str, float]:
    """POPE's figures, 'yes' being what is looked for. The rate of yes is that of what was said, not of the truth."""
    pairs = list(zip(said, right, strict=True))
    true = sum(a == "yes" == b for a, b in pairs)
    claimed, there = sum(a == "yes" for a in said), sum(b == "yes" for b in right)
    precision, recall = safe_ratio(true, claimed), safe_ratio(true, there)
    return {
        "precision": precision,
        "recall": recall,
        "f1": safe_ratio(2 * precision * recall, precision + recall),
        "yes_rate": safe_ratio(claimed, len(pairs)),
        "yes_rate_of_the_truth": safe_ratio(there, len(pairs)),
    }


def majority_baseline(right: Sequence[str], score: Callable[[str, int], float]) -> tuple[str, float]:
    """The commonest answer, and what saying nothing else scores. score: of an answer to row number n."""
    answer, _ = Counter(right).most_common(1)[0]
    return answer, sum(score(answer, n) for n in range(len(right))) / len(right)
