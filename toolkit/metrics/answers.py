"""Answers read strictly and counted honestly: what a model said, whether it is right, and how sure one can be of a share.

Three kinds of questions: short answers (vqa), yes or no (yesno), multiple choice (mcq). What cannot be read is unparsed, counts as
wrong, and is shown.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

LETTERS = "ABCDEFGHIJ"
LEVEL = 1.959964  # of the normal distribution, for intervals of 95 %
NUMBERS = {
    w: str(n)
    for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
ARTICLES = {"a", "an", "the"}


# ---------------------------------------------------------------------------------------------- reading


def normalised(text: str) -> str:
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
    same = [letter for letter, option in known.items() if plain(option) == plain(text)]
    if len(same) == 1:
        return same[0]
    if match := re.fullmatch(rf"(?i:the answer is|answer:)\s*\(?([{letters}])\)?\.?", text):
        return match.group(1)
    match = re.fullmatch(rf"\(?([{letters}])\)?(?:[.:),](.*))?", text, flags=re.DOTALL)
    if match is None:
        return None
    letter, rest = match.group(1), (match.group(2) or "").strip()
    others = set(re.findall(rf"\b([{letters}])\b", rest)) - {letter}
    return None if others and plain(rest) != plain(known[letter]) else letter


def plain(text: str) -> str:
    """The text normalised, or as it is when nothing would be left of it (a letter, a sign)."""
    return normalised(text) or text.strip().lower()


def vqa_score(said: str, answers: Sequence[str]) -> float:
    """Right or wrong for up to three references; for more the soft accuracy of VQAv2: min(1, matches / 3), one left out in turn."""
    said, known = plain(said), [plain(answer) for answer in answers]
    if len(known) < 4:
        return float(said in known)
    turns = [min(1.0, sum(said == k for n, k in enumerate(known) if n != left) / 3) for left in range(len(known))]
    return sum(turns) / len(turns)


# ---------------------------------------------------------------------------------------------- counting


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, z = right / count, LEVEL**2 / count
    middle = (share + z / 2) / (1 + z)
    half = LEVEL / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as uneven a split or more, among the rows on which two models differ (McNemar 1947)."""
    count, most = gained + lost, max(gained, lost)
    term = tail = math.comb(count, most)
    for k in range(most, count):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**count)


def cluster_interval(
    values: Sequence[float], clusters: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean whose values come in clusters (questions about one picture): whole clusters are drawn."""
    names = sorted(set(clusters))
    sums, counts = Counter(), Counter()
    for value, name in zip(values, clusters, strict=True):
        sums[name] += value
        counts[name] += 1
    total, size = np.array([sums[n] for n in names], dtype=float), np.array([counts[n] for n in names], dtype=float)
    chosen = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = total[chosen].sum(1) / size[chosen].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def share(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float | int]:
    """A mean with its interval: Wilson's when all is right or wrong and no two values share a cluster, the clusters' otherwise."""
    mean, count = sum(values) / len(values), len(set(clusters))
    if count == len(clusters) and all(value in (0.0, 1.0) for value in values):
        low, high = wilson(sum(values), len(values))
    else:
        low, high = cluster_interval(values, clusters)
        if low == high:  # all alike: the bootstrap would be sure after three rows
            low, high = wilson(mean * count, count)
    return {"mean": mean, "low": low, "high": high, "rows": len(values)}


def verdict(difference: Sequence[float], clusters: Sequence[str]) -> tuple[str, float, float]:
    """'improved' or 'worse' only when the paired 95 % interval says so and the clusters' signs too, 'no difference shown' otherwise;
    and that interval.

    The bootstrap alone would be sure after one row. difference: what each row gained, tuned minus base.
    """
    low, high = cluster_interval(difference, clusters)
    sums: Counter[str] = Counter()
    for value, name in zip(difference, clusters, strict=True):
        sums[name] += value  # type: ignore[assignment]
    sure = mcnemar(sum(value > 0 for value in sums.values()), sum(value < 0 for value in sums.values())) < 0.05
    word = "improved" if low > 0 and sure else "worse" if high < 0 and sure else "no difference shown"
    return word, low, high


def yes_no_figures(said: Sequence[str | None], right: Sequence[str]) -> dict[str, float]:
    """POPE's figures, 'yes' being what is looked for. The rate of yes is that of what was said, not of the truth."""
    pairs = list(zip(said, right, strict=True))
    true = sum(a == "yes" == b for a, b in pairs)
    claimed, there = sum(a == "yes" for a in said), sum(b == "yes" for b in right)
    precision, recall = ratio(true, claimed), ratio(true, there)
    return {
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_rate": ratio(claimed, len(pairs)),
        "yes_rate_of_the_truth": ratio(there, len(pairs)),
    }


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole else 0.0


def majority(right: Sequence[str], score: Callable[[str, int], float]) -> tuple[str, float]:
    """The commonest answer, and what saying nothing else scores. score: of an answer to row number n."""
    answer, _ = Counter(right).most_common(1)[0]
    return answer, sum(score(answer, n) for n in range(len(right))) / len(right)
