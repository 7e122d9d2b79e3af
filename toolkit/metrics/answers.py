"""Answers read strictly and counted honestly: what a model said, whether it is right, and how sure one can be of a share.

Three kinds of questions: short answers (vqa), yes or no (yesno), multiple choice (mcq). What cannot be read is unparsed, counts as
wrong, and is shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from ..data.choices import LETTERS
from .statistics import safe_ratio

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS = {word: str(number) for number, word in enumerate(WORDS)}
ARTICLES = {"a", "an", "the"}
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
PIECE = re.compile(r"[-+]?(?:\d+\.\d+|\.\d+|\d+)(?![\w])|[\w']+|[-+<>=#*/^:≤≥≠±~]")
LIST_MARK = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
THOUGHT = re.compile(r"^.*</(?:think|thinking|thought|reasoning)>", re.DOTALL)


# ---------------------------------------------------------------------------------------------- reading


def strip_thoughts(text: str) -> str:
    """An answer without what was thought before it."""
    return THOUGHT.sub("", text).strip()


def strip_marks(text: str) -> str:
    """A text without Markdown's emphasis and code, and without TeX's box around an answer."""
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\$([^$\n]+)\$", r"\1", text)
    return re.sub(r"(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1", r"\2", text)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits: answers that are alike for people become alike.

    A number keeps its sign and its decimals and loses the commas of its thousands; signs that make another thing of a word or a formula
    (C++ and C#, x > 3 and x < 3) stay, hyphens within words do not.
    """
    text = strip_marks(text).lower().replace("\u2212", "-").replace("\u2013", "-")
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])|(?<=[^\W\d]{2})-(?=\d)", " ", text)  # T-shirt, covid-19
    text = re.sub(r"(?<!\d)[:/]|[:/](?!\d)", " ", text)  # and/or, but 1/2 and 3:45
    text = re.sub(r"(?<![\w)])\*|\*(?![\w(])|(?<!\w)#", " ", text)
    words = []
    for match in PIECE.finditer(text):
        piece = match[0]
        before = text[match.start() - 1] if match.start() else " "
        if piece[0] in "+-" and len(piece) > 1:
            if before.isalnum() or before in ")_":  # x-1: the sign is between two things
                words += [piece[0], number_text(piece[1:])]
            else:
                words.append(number_text(piece))
        elif piece[0].isdigit() or (piece[0] == "." and len(piece) > 1):
            words.append(number_text(piece))
        else:
            words.append(piece)
    while words and words[0] == "-" and len(words) > 1 and not words[1][0].isdigit():
        words = words[1:]  # of a list
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def number_text(text: str) -> str:
    """A number as digits, the same for 3.50, +3.5 and 3.5; what is none as it is."""
    if not re.fullmatch(r"[-+]?(\d+(\.\d+)?|\.\d+)", text):
        return text
    if "." not in text:
        sign, digits = ("-" if text[0] == "-" else ""), text.lstrip("+-")
        return sign + digits if digits.strip("0") else digits
    return format(Decimal(text).normalize(), "f")


def read_yesno(text: str) -> str | None:
    """'yes' or 'no' when exactly one of the two words is in the first sentence; None otherwise."""
    text = LIST_MARK.sub("", strip_marks(strip_thoughts(text)))
    first = re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0].lower()
    found = {word for word in re.findall(r"[a-z]+", first) if word in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter of the chosen option; None when it cannot be told.

    Read are 'B', 'b', 'B.', '(B)', 'B: ...', '**B**', 'Option B', 'The (correct) answer is B', and an option's own text.
    """
    known = dict(zip(LETTERS, options, strict=False))
    letters, text = "".join(known), strip_marks(strip_thoughts(text)).strip()
    same = [letter for letter, option in known.items() if normalize_or_keep(option) == normalize_or_keep(text)]
    if len(same) == 1:
        return same[0]
    if match := re.fullmatch(rf"\(?([{letters}{letters.lower()}])\)?\.?", text):
        return match[1].upper()
    lead = r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)*(?:answer|option|choice)(?:\s+is)?\s*:?\s*)"
    text = re.sub(rf"^(?i:{lead})+(?=\(?[{letters}]\b)", "", text).strip()
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
    said, known = normalize_or_keep(strip_thoughts(said)), [normalize_or_keep(answer) for answer in answers]
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
