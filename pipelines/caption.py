"""Captions for photos of a subject: a vision-language model says what is to be seen, and the words that call the subject are put in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..toolkit.core.errors import UserError
from ..toolkit.data.conversations import Conversation
from ..toolkit.embedded.questions import DESCRIBE
from .chat import answers

MAX_CAPTION_TOKENS = 60  # tokens of a caption: diffusion models' text encoders read 77
OPENINGS = re.compile(
    r"^(?:(?:the|this) (?:picture|image|photo)\w* (?:shows|depicts|features|is of|contains)\s+)", re.I
)


def generate_captions(
    vision: Any, images: Sequence[Path], token: str, class_noun: str, *, question: str = DESCRIBE
) -> Iterator[str]:
    """A caption for each image, as soon as it is made. vision: from `open_chat`.

    Raises:
        UserError: when the model says nothing of an image.
    """
    for path in images:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        row = Conversation(({"role": "user", "content": content},), (path,), path.name)
        vision.chat.check_row(row)
        [said] = answers(vision, [row], max_new_tokens=MAX_CAPTION_TOKENS)
        if not said.strip():
            raise UserError(
                f"The model gives no caption for {path.name}: ask it in another way, or write the caption by hand."
            )
        yield format_caption(said, token, class_noun)


def format_caption(said: str, token: str, class_noun: str) -> str:
    """One line, in which the class noun, or what stands in front where it does not occur, is called by the token.

    >>> caption_of("The image shows a dog on a sofa. It is asleep.", "sks", "dog")
    'a sks dog on a sofa'
    >>> caption_of("A red armchair.", "sks", "dog")
    'a sks dog, a red armchair'
    """
    sentence = re.split(r"(?<=[.!?])\s|\n", said.strip())[0].rstrip(".!? ")
    text = OPENINGS.sub("", sentence)
    text = text[:1].lower() + text[1:]
    if re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text):
        return text
    noun = re.compile(rf"(?<!\w){re.escape(class_noun)}(?!\w)", re.I)
    if noun.search(text):
        return noun.sub(lambda found: f"{token} {found.group()}", text, count=1)
    return f"a {token} {class_noun}, {text}"
