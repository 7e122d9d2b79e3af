"""Questions with options: how they are put, and which letter the right answer has."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from ..core.errors import UserError

LETTERS = "ABCDEFGHIJ"
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's words


def read_choices(row: dict[str, Any]) -> tuple[str, ...]:
    """The options of a row: a list, a list as text (MMMU's), or an object with their letters; () for none.

    Raises:
        UserError: for anything else, and for more than there are letters.
    """
    given = row.get("choices") or row.get("options") or ()
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"the options must be a list, not the text {given[:80]!r}.") from error
    if isinstance(given, dict):
        if list(given) != list(LETTERS[: len(given)]):
            raise UserError(
                f"the options must be a list, or an object with the keys A, B, ..., not {', '.join(given)}."
            )
        given = list(given.values())
    if not isinstance(given, (list, tuple)):
        raise UserError("the options must be a list.")
    if len(given) > len(LETTERS):
        raise UserError(f"{len(given)} choices are more than the {len(LETTERS)} that have letters.")
    return tuple(str(option) for option in given)


def choice_question(question: str, options: Sequence[str]) -> str:
    """The words that are put to the model."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{listed}\n{LETTER_INSTRUCTION}"


def choice_letter(answer: str, options: Sequence[str], *, number: bool = False) -> str:
    """The letter of the right option, given as its text, as a letter, or as its index from 0.

    number: whether the answer was a number in the data, and not a text.

    Raises:
        UserError: when it is none of the options, or could be two of them.
    """
    letters, answer = LETTERS[: len(options)], answer.strip()
    bare = answer.removesuffix(".").strip("()").strip().upper()
    by_text = letters[options.index(answer)] if answer in options else ""
    by_letter = bare if len(bare) == 1 and bare in letters else ""
    by_index = letters[int(answer)] if is_index(answer, options) else ""
    if number and by_text and by_index and by_text != by_index:
        raise UserError(
            f"the answer {answer} is the text of option {by_text}, and the index (from 0) of {by_index}: give the letter."
        )
    if by_text and by_letter and by_text != by_letter:
        raise UserError(
            f"the answer '{answer}' is the text of option {by_text}, and a letter of its own: give the letter."
        )
    if found := by_text or by_letter or by_index:
        return found
    raise UserError(f"the answer '{answer}' is none of the choices.")


def is_index(answer: str, options: Sequence[str]) -> bool:
    """Whether an answer is the index of an option, counted from 0."""
    return answer.isdecimal() and answer.isascii() and int(answer) < len(options)
