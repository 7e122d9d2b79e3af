"""What the mark of an image becomes in a text, by the image's size alone.

Processors write it when they are given the image. Where they know by a formula how many tokens an image of a size takes, and write one
token so many times, or have only few layouts, nothing need be processed; `prove` compares with what they do write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from ..core.errors import UserError

Size = tuple[int, int]  # width, height
PROBES = ((96, 64), (320, 240), (200, 500))  # sizes that are tried


@dataclass(frozen=True)
class RepeatedToken:
    """What an image becomes where that is one token many times."""

    head: str
    token: str
    tail: str
    offset: int
    """Tokens more than the processor's formula says."""
    overhead: int
    """Tokens of head and tail."""


class ImageTokens:
    """What the marks of images become."""

    def __init__(self, processor: Any, mark: str, pad_to_square: bool) -> None:
        """mark: what the template writes for an image."""
        self.processor, self.mark, self.pad_to_square = processor, mark, pad_to_square
        self.reset()

    def reset(self) -> None:
        """Forgets all sizes."""
        self.formula_holds = True
        self.layouts: dict[Any, str] = {}
        self.one = lru_cache(maxsize=65536)(self.find_one)
        self.several = lru_cache(maxsize=4096)(self.process)
        self.tokens = lru_cache(maxsize=4096)(self.count_tokens)
        for name in ("_repeated", "_each"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned, and read images with a memory of their own."""
        return {"processor": self.processor, "mark": self.mark, "pad_to_square": self.pad_to_square}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset()

    # ------------------------------------------------------------------------------------ images

    def prepare(self, image: Image.Image) -> Image.Image:
        """The image as the processor is given it: in a square of its mean colour, if so wished (LLaVA-1.5 was trained so)."""
        if not self.pad_to_square or image.width == image.height:
            return image
        side, mean = max(image.size), getattr(self.processor.image_processor, "image_mean", None) or [0.5] * 3
        ground = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
        ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return ground

    def prepared_size(self, size: Size) -> Size:
        """The size of an image as the processor is given it."""
        return (max(size), max(size)) if self.pad_to_square else size

    # ------------------------------------------------------------------------------------ texts

    def replacements(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """What the marks of images of these sizes become, when they stand together in one conversation.

        Raises:
            UserError: when the processor takes no image of such a size.
        """
        if not sizes:
            return ()
        sizes = tuple(self.prepared_size(size) for size in sizes)
        if len(sizes) == 1:
            return (self.one(sizes[0]),)
        each = self.each_of_several
        if each == "alone":
            return tuple(self.one(size) for size in sizes)
        return (each,) * len(sizes) if each else self.several(sizes)

    def process(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """The same by the processor, from blank images.

        Raises:
            UserError: when the processor takes no image of such a size.
        """
        blanks = [Image.new("RGB", size) for size in sizes]
        try:
            out = self.processor(text=[self.mark * len(sizes)], images=[blanks], return_text_replacement_offsets=True)
        except Exception as error:
            raise UserError(size_error(sizes, error)) from error
        return tuple(one["replacement"] for one in out["text_replacement_offsets"][0])

    def find_one(self, size: Size) -> str:
        """What the mark of an image becomes that stands alone."""
        layout = self.layout(size)
        if layout is None:
            return self.process((size,))[0]
        if (repeated := self.repeated) is not None:
            return repeated.head + repeated.token * (layout[0] + repeated.offset) + repeated.tail
        if len(layout) == 1:  # as many tokens may stand in other rows
            return self.process((size,))[0]
        if layout not in self.layouts:
            self.layouts[layout] = self.process((size,))[0]
        return self.layouts[layout]

    def layout(self, size: Size) -> tuple[int, ...] | None:
        """Tokens of an image and its rows and columns of tiles, by the processor's formulas; None where it has none.

        Raises:
            UserError: when the processor takes no image of such a size.
        """
        if not self.formula_holds:
            return None
        width, height = size
        tiles = getattr(self.processor.image_processor, "get_number_of_image_patches", None)
        try:
            found = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
            parts = tiles(height, width, {}) if tiles is not None else ()
            return (int(found["num_image_tokens"][0]), *(parts if isinstance(parts, tuple) else ()))
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(size_error((size,), error)) from error
        except Exception:
            return None

    @property
    def repeated(self) -> RepeatedToken | None:
        """The token that images become many of; None where they become something else."""
        if "_repeated" not in self.__dict__:
            self._repeated = self.find_repeated()
        return self._repeated

    def find_repeated(self) -> RepeatedToken | None:
        """The same, from what the processor does with images of a few sizes."""
        found: set[RepeatedToken] = set()
        for size in PROBES:
            text, layout = self.process((size,))[0], self.layout(size)
            token = max(self.image_texts(), key=text.count, default="")
            if layout is None or not token or not text.count(token):
                return None
            head, tail = text[: text.index(token)], text[text.rindex(token) + len(token) :]
            count = text.count(token)
            if head + token * count + tail != text:
                return None
            found.add(RepeatedToken(head, token, tail, count - layout[0], self.count_tokens(head + token + tail) - 1))
        return found.pop() if len(found) == 1 else None

    @property
    def each_of_several(self) -> str:
        """What one of several images becomes: 'alone' for what it would alone, the text where it is the same for all, '' for neither."""
        if "_each" not in self.__dict__:
            both = self.process(PROBES[:2])
            alone = tuple(self.one(size) for size in PROBES[:2])
            texts = {*both, *self.process(PROBES[1:])}
            self._each = "alone" if both == alone else texts.pop() if len(texts) == 1 else ""
        return self._each

    def image_texts(self) -> list[str]:
        """Texts of the tokens that stand for what images become."""
        ids = [*getattr(self.processor, "image_token_ids", []), getattr(self.processor, "image_token_id", None)]
        return [self.processor.tokenizer.convert_ids_to_tokens(number) for number in ids if number is not None]

    def prove(self, sizes: Iterable[Size]) -> None:
        """Compares the formulas with the processor on images of these sizes; where they differ, they are not used any more."""
        for size in sizes:
            if self.formula_holds and self.replacements((size,)) != self.process((self.prepared_size(size),)):
                self.reset()
                self.formula_holds = False

    # ------------------------------------------------------------------------------------ numbers

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_counts(self, sizes: tuple[Size, ...]) -> list[int]:
        """Tokens of what each image becomes."""
        texts, repeated = self.replacements(sizes), self.repeated
        if repeated is None:
            return [self.tokens(text) for text in texts]
        length = len(repeated.head) + len(repeated.tail)
        return [repeated.overhead + (len(text) - length) // len(repeated.token) for text in texts]


def size_error(sizes: tuple[Size, ...], error: Exception) -> str:
    """What a processor says of images that it does not take."""
    shown = " and ".join(f"{width} x {height}" for width, height in sizes[:4])
    return f"the base's processor does not take an image of {shown} pixels: {' '.join(str(error).split())[:200]}"
