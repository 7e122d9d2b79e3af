"""Conversations made ready for training: planned without a pixel, proven on the first rows, batched by length, read ahead.

Which rows a forward pass takes is a function of (seed, position), so neither workers nor a resume change what is learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ...toolkit.core.cache import file_hash
from ...toolkit.core.errors import UserError
from ...toolkit.core.randomness import permutation
from ...toolkit.data.conversations import Conversation, read_conversations
from ...toolkit.data.images import describe_source, image_size, load_rgb
from ...toolkit.vlm.chat_tokens import ChatTokens
from ..config.instruct import ConversationConfig

NUM_VERIFIED = 8  # rows at the beginning whose labels are found in two ways
GROUP_BATCHES = 50  # batches that are sorted by length together


@dataclass
class PlannedRows:
    """Rows that fit, with what is known of them."""

    rows: list[Conversation] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens, those of images counted."""
    num_learned: list[int] = field(default_factory=list)
    """Tokens that are learned."""
    too_long: list[str] = field(default_factory=list)
    """Places of rows that were left out."""
    truncated: int = 0
    """Rows of which only the first exchanges are kept."""
    faults: list[str] = field(default_factory=list)
    """One sentence for each row that cannot be used."""

    def __len__(self) -> int:
        return len(self.rows)


def plan_rows(file: Path, config: ConversationConfig, chat: ChatTokens) -> PlannedRows:
    """Reads a data file and finds every row's length, from texts and the headers of images.

    Raises:
        UserError: for a row that cannot be used, and when none is left.
    """
    read = read_conversations(file, config.images, skip_bad=config.skip_bad)
    planned = PlannedRows(faults=read.faults)
    for row in read.rows:
        try:
            plan_row(row, config, chat, planned)
        except UserError as error:
            if not config.skip_bad:
                raise UserError(locate_error(error, row)) from error
            planned.faults.append(locate_error(error, row))
    if not planned.rows:
        raise UserError(
            f"{file}: no row is left to learn from ({len(planned.too_long)} are longer than --max-length {config.max_length}, "
            f"{len(planned.faults)} cannot be used)."
        )
    return planned


def locate_error(error: UserError, row: Conversation) -> str:
    """An error's sentence with the row that it is about."""
    return str(error) if str(error).startswith(row.location) else f"{row.location}: {error}"


def plan_row(row: Conversation, config: ConversationConfig, chat: ChatTokens, planned: PlannedRows) -> None:
    """Adds a row, as much of it as fits."""
    sizes = [image_size(image) for image in row.images]
    least = 3 if row.messages[0]["role"] == "system" else 2
    for count in range(len(row.messages), least - 1, -2):
        part = row.until(count)
        tokens = chat.labels_by_marks(part, sizes[: len(part.images)])
        if len(tokens.ids) <= config.max_length:
            planned.rows.append(part)
            planned.lengths.append(len(tokens.ids))
            planned.num_learned.append(tokens.num_learned)
            planned.truncated += count < len(row.messages)
            return
        if not config.truncate:
            break
    planned.too_long.append(row.location)


def verify_rows(planned: PlannedRows, chat: ChatTokens) -> int:
    """Proves the labels of the first rows, and of the first of each number of images; returns how many.

    Raises:
        UserError: naming what does not agree.
    """
    kinds: dict[int, Conversation] = {}
    for row in planned.rows:
        kinds.setdefault(len(row.images), row)
    chosen = {id(row): row for row in [*planned.rows[:NUM_VERIFIED], *list(kinds.values())[:NUM_VERIFIED]]}
    for row in chosen.values():
        chat.verify_labels(row, load_images(row))
    return len(chosen)


def load_images(row: Conversation) -> list[Any]:
    """A row's images.

    Raises:
        UserError: with the row's place, for one that cannot be read.
    """
    try:
        return [load_rgb(image) for image in row.images]
    except UserError as error:
        raise UserError(f"{row.location}: {error}") from error


def data_certificate(file: Path, planned: PlannedRows, chat: ChatTokens, num_verified: int) -> dict[str, Any]:
    """What an adapter says of the data it learned from: hashes, counts, and how many rows' labels were proven."""
    files = sorted(f"{describe_source(image)}:{source_bytes(image)}" for row in planned.rows for image in row.images)
    return {
        "file": Path(file).name,
        "sha256": data_hash(Path(file)),
        "rows": len(planned),
        "left_out_too_long": len(planned.too_long),
        "left_out_invalid": len(planned.faults),
        "truncated": planned.truncated,
        "images": len(files),
        "images_sha256": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "tokens": sum(planned.lengths),
        "tokens_learned": sum(planned.num_learned),
        "template_sha256": hashlib.sha256(str(chat.processor.chat_template).encode()).hexdigest(),
        "labels_verified_in_two_ways": num_verified,
    }


def data_hash(file: Path) -> str:
    """Hash of a data file's bytes, or of all files of a data-set folder."""
    if file.is_file():
        return file_hash(file)
    names = sorted(path for path in file.rglob("*") if path.is_file())
    return hashlib.sha256("".join(f"{path.name}{file_hash(path)}" for path in names).encode()).hexdigest()


def source_bytes(image: Any) -> int:
    """Bytes of an image's file."""
    return image.stat().st_size if isinstance(image, Path) else len(image)


# ---------------------------------------------------------------------------------------------- which rows when


@dataclass(frozen=True)
class Sampler:
    """Which rows each forward pass takes: passes over all rows, in batches of similar length, in mixed order.

    Rows of the data come first, then those of the replay, of which every pass takes other ones, `num_replayed` in all.
    """

    lengths: tuple[int, ...]
    num_data: int
    num_replayed: int
    batch_size: int
    group_by_length: bool
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes in one pass over the data."""
        return -(-(self.num_data + self.num_replayed) // self.batch_size)

    def rows(self, number: int) -> list[int]:
        """Rows of forward pass `number`."""
        epoch, turn = divmod(number, self.batches_per_epoch)
        return epoch_batches(self, epoch)[turn]


@lru_cache(maxsize=4)
def epoch_batches(sampler: Sampler, epoch: int) -> list[list[int]]:
    """All batches of one pass, every one full: the first rows come once more at the end."""
    rows = list(range(sampler.num_data))
    spare = len(sampler.lengths) - sampler.num_data
    start = epoch * sampler.num_replayed
    for at in range(start, start + sampler.num_replayed):
        rows.append(sampler.num_data + permutation(sampler.seed + 1, spare, at // spare)[at % spare])
    mixed = [rows[i] for i in permutation(sampler.seed, len(rows), epoch)]
    wanted = sampler.batches_per_epoch * sampler.batch_size
    mixed = (mixed * -(-wanted // len(mixed)))[:wanted]
    if not sampler.group_by_length:
        return [mixed[i : i + sampler.batch_size] for i in range(0, wanted, sampler.batch_size)]
    batches = []
    for start in range(0, wanted, GROUP_BATCHES * sampler.batch_size):
        group = sorted(mixed[start : start + GROUP_BATCHES * sampler.batch_size], key=lambda row: sampler.lengths[row])
        batches += [group[i : i + sampler.batch_size] for i in range(0, len(group), sampler.batch_size)]
    return [batches[i] for i in permutation(sampler.seed + 2, len(batches), epoch)]


# ---------------------------------------------------------------------------------------------- reading ahead


class ConversationBatches(Dataset):
    """Forward pass number -> the tensors of this process's slots."""

    def __init__(self, rows: Sequence[Conversation], sampler: Sampler, chat: ChatTokens, slots: Sequence[int]) -> None:
        self.rows, self.sampler, self.chat, self.slots = rows, sampler, chat, slots

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        chosen = self.sampler.rows(number)
        own = [self.rows[chosen[slot]] for slot in self.slots]
        return self.chat.collate(own, [load_images(row) for row in own])


class Prefetcher:
    """Batches in order, read ahead by worker processes."""

    def __init__(self, batches: ConversationBatches, workers: int, pin_memory: bool) -> None:
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory
        self.next, self.source = -1, iter(())

    def fetch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of this forward pass; cheapest when passes are asked for one after another.

        Raises:
            UserError: for an image that cannot be read.
        """
        if number != self.next:
            self.source = self.start_loader(number)
        self.next = number + 1
        return next(self.source)

    def start_loader(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """An endless reader that begins at this forward pass."""
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(number, number + 10**9),
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # its own, or starting it would draw from the one that dropout draws from
            )
        )
