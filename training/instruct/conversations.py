"""Conversations made ready for training: planned without a pixel, proven on the first rows, batched by length, read ahead.

Which rows a forward pass takes is a function of (seed, position), so neither workers nor a resume change what is learned.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ...toolkit.core.cache import cache_key, file_hash
from ...toolkit.core.errors import UserError, list_names
from ...toolkit.core.randomness import permutation
from ...toolkit.data.conversations import Conversation, read_conversations
from ...toolkit.data.image_checks import CheckedImage, PlanMemory, check_images
from ...toolkit.data.images import describe_source
from ...toolkit.data.row_files import data_files
from ...toolkit.data.videos import Medium, Video, load_medium, medium_parts
from ...toolkit.vlm.chat_tokens import ChatTokens, Measure, MediumSize
from ...toolkit.vlm.video_tokens import ASSUMED_RATE
from ..config.instruct import ConversationConfig
from ..evaluation.items import image_cluster

NUM_VERIFIED = 8  # rows at the beginning whose labels are found in two ways
HELD_OUT = 0.1  # share of the data that is measured by
GROUP_BATCHES = 50  # batches that are sorted by length together


@dataclass
class PlannedRows:
    """Rows that fit, with what is known of them."""

    rows: list[Conversation] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens, those of images counted."""
    num_learned: list[int] = field(default_factory=list)
    """Tokens that are learned."""
    weights: list[float] = field(default_factory=list)
    """Sums of the weights of the tokens that are learned."""
    too_long: list[str] = field(default_factory=list)
    """Places of rows that were left out."""
    longest: int = 0
    """Tokens of the longest row that was left out."""
    truncated: int = 0
    """Rows of which only the first exchanges are kept."""
    faults: list[str] = field(default_factory=list)
    """One sentence for each row that cannot be used."""
    unused: str = ""
    """Which fields are not used, a sentence; '' for none."""
    notes: list[str] = field(default_factory=list)
    """What else to know of the data, one sentence each."""
    split: int = 0
    """Rows that became one for each of their answers."""

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Conversation, measure: Measure) -> None:
        """Adds a row that fits."""
        self.rows.append(row)
        self.lengths.append(measure.length)
        self.num_learned.append(measure.num_learned)
        self.weights.append(measure.weight)

    def select(self, numbers: Sequence[int]) -> PlannedRows:
        """Some of the rows; what was left out stays with all of them."""
        return PlannedRows(
            rows=[self.rows[n] for n in numbers],
            lengths=[self.lengths[n] for n in numbers],
            num_learned=[self.num_learned[n] for n in numbers],
            weights=[self.weights[n] for n in numbers],
        )

    @property
    def left_out_share(self) -> float:
        """Share of the file's rows that is left out."""
        out = len(self.too_long) + len(self.faults)
        return out / max(1, out + len({row.location for row in self.rows}))

    def describe_left_out(self, max_length: int) -> list[str]:
        """What is not learned from, in lines."""
        lines = []
        if self.too_long:
            lines.append(
                f"left out {len(self.too_long)} longer than {max_length} tokens, such as {self.too_long[0]} "
                f"(the longest has {self.longest}: --max-length, --max-pixels or --truncate would keep them)"
            )
        lines += [f"left out {fault}" for fault in self.faults[:5]]
        if len(self.faults) > 5:
            lines.append(f"left out {len(self.faults) - 5} more")
        if self.truncated:
            lines.append(f"{self.truncated} rows are truncated to the exchanges that fit {max_length} tokens")
        if self.split:
            lines.append(
                f"{self.split} rows are learned answer by answer, since the chat template rewrites earlier ones"
            )
        return lines + ([self.unused] if self.unused else [])

    def count_media(self) -> str:
        """How many images and videos there are, and how many frames of these are seen."""
        media = [medium for row in self.rows for medium in row.images]
        videos = [medium for medium in media if isinstance(medium, Video)]
        words = f"{len(media) - len(videos)} images"
        if not videos:
            return words
        counts = sorted(len(video.size.chosen) for video in videos if video.size)
        return f"{words} and {len(videos)} videos ({counts[0]} to {counts[-1]} frames seen of each, median {counts[len(counts) // 2]})"

    def describe(self, max_length: int) -> list[str]:
        """What is learned from and what is not, in lines."""
        lengths, learned = sorted(self.lengths), sum(self.num_learned)
        return [
            f"rows     {len(self)}, with {self.count_media()}",
            f"tokens   {lengths[0]} to {lengths[-1]} per row, median {lengths[len(lengths) // 2]}; {sum(lengths):,} in all",
            f"learned  {learned:,} of them ({learned / sum(lengths):.1%})",
            *self.describe_left_out(max_length),
            *self.notes,
        ]


def plan_rows(file: Path, config: ConversationConfig, chat: ChatTokens) -> PlannedRows:
    """Reads a data file, decodes its images once, and finds every row's length; what was found is remembered.

    Raises:
        UserError: for a row that cannot be used, and when none is left.
    """
    read = read_conversations(
        file,
        config.images,
        skip_bad=config.skip_bad,
        columns=config.columns if file == config.data else (),
        split=config.split if file == config.data else "",
        learn=config.learn_turns,
    )
    planned = PlannedRows(faults=read.faults, unused=read.unused.describe())
    memory = PlanMemory(file)
    images = check_images((image for row in read.rows for image in row.images), memory)
    sound = dict.fromkeys(one.size for one in images.values() if not one.fault and not one.frames)
    if sound:
        chat.images.prove(list(sound)[:NUM_VERIFIED])
    measures = RowMeasures(chat, images, memory)
    for row in read.rows:
        try:
            plan_row(chat.choose_frames(row, images), config, measures, planned)
        except UserError as error:
            if not config.skip_bad:
                raise UserError(f"{locate_error(error, row)} (--skip-bad leaves such rows out.)") from error
            planned.faults.append(locate_error(error, row))
    memory.save()
    planned.notes = [*page_notes(images), *video_notes(planned.rows, config)]
    if not planned.rows:
        raise UserError(
            f"{file}: no row is left to learn from ({len(planned.too_long)} are longer than --max-length {config.max_length}"
            f"{f', the longest of {planned.longest} tokens' if planned.longest else ''}; {len(planned.faults)} cannot be used). A higher "
            f"--max-length, a lower --max-pixels, or --truncate would keep them."
        )
    return planned


def page_notes(images: dict[Medium, CheckedImage]) -> list[str]:
    """Which images' files hold more than is seen."""
    more = [
        describe_source(source) for source, one in images.items() if one.pages > 1 and not isinstance(source, Video)
    ]
    return [f"Of {list_names(more)}, only the first frame or page is seen"] if more else []


def video_notes(rows: Sequence[Conversation], config: ConversationConfig) -> list[str]:
    """What is assumed of videos, and which settings do not hold for them."""
    videos = [medium for row in rows for medium in row.images if isinstance(medium, Video)]
    notes = []
    if unknown := sum(isinstance(video.source, tuple) and video.fps is None for video in videos):
        notes.append(
            f"{unknown} videos are frames without frames per second (the field 'fps'): {ASSUMED_RATE:g} are assumed, as transformers does"
        )
    if videos and (config.max_pixels or config.min_pixels):
        notes.append("--max-pixels and --min-pixels are of images; the base's own rule says how large frames are")
    return notes


class RowMeasures:
    """How long rows are, remembered."""

    def __init__(self, chat: ChatTokens, images: dict[Medium, CheckedImage], memory: PlanMemory) -> None:
        self.chat, self.images, self.memory = chat, images, memory
        self.base = chat.fingerprint()

    def measure(self, row: Conversation) -> Measure:
        """How long a row is.

        Raises:
            UserError: for an image that is not sound, and as `ChatTokens.measure` does.
        """
        sizes: list[MediumSize] = []
        for image in row.images:
            if fault := self.images[image].fault:
                raise UserError(fault)
            clip = image.size if isinstance(image, Video) else None
            sizes.append(clip or self.images[image].size)
        key = f"row {cache_key(base=self.base, messages=row.messages, weights=row.weights, sizes=sizes)[:32]}"
        match self.memory.recall(key):
            case [int(length), int(num_learned), int(weight) | float(weight)]:
                return Measure(length, num_learned, weight)
        one = self.chat.measure(row, sizes)
        self.memory.note(key, [one.length, one.num_learned, one.weight])
        return one


def locate_error(error: UserError, row: Conversation) -> str:
    """An error's sentence with the row that it is about."""
    return str(error) if str(error).startswith(row.location) else f"{row.location}: {error}"


def plan_row(row: Conversation, config: ConversationConfig, measures: RowMeasures, planned: PlannedRows) -> None:
    """Adds a row, as much of it as fits; one for each of its answers, where they cannot be learned from one text."""
    turns = measures.chat.split_turns(row)
    planned.split += len(turns) > 1
    for turn in turns:
        plan_turn(turn, config, measures, planned)


def plan_turn(row: Conversation, config: ConversationConfig, measures: RowMeasures, planned: PlannedRows) -> None:
    """Adds a conversation, as much of it as fits."""
    least = 3 if row.messages[0]["role"] == "system" else 2
    for count in range(len(row.messages), least - 1, -2):
        part = row.until(count)
        if not any(part.weight(number) for number in range(count)):
            break
        measure = measures.measure(part)
        if measure.length <= config.max_length:
            planned.add(part, measure)
            planned.truncated += count < len(row.messages)
            return
        if count == len(row.messages):
            planned.longest = max(planned.longest, measure.length)
        if not config.truncate:
            break
    planned.too_long.append(row.location)


def hold_out(planned: PlannedRows, seed: int) -> tuple[PlannedRows, PlannedRows]:
    """The rows to learn from, and one in ten to measure by; rows with the same images stay together.

    Raises:
        UserError: when all rows show the same images.
    """
    clusters: dict[str, list[int]] = {}
    for number, row in enumerate(planned.rows):
        clusters.setdefault(image_cluster(row), []).append(number)
    if len(clusters) < 2:
        raise UserError("All rows show the same image, so none can be held out: give others with --evaluate-data.")
    order = sorted(clusters, key=lambda name: hashlib.sha256(f"{seed}/held out/{name}".encode()).hexdigest())
    wanted, out = max(1, round(HELD_OUT * len(planned))), list[int]()
    for name in order[:-1]:
        if len(out) >= wanted:
            break
        out += clusters[name]
    chosen = set(out)
    kept = [number for number in range(len(planned)) if number not in chosen]
    return planned.select(kept), planned.select(sorted(chosen))


def verify_rows(planned: PlannedRows, chat: ChatTokens) -> int:
    """Proves the labels of the first rows, and of the first of each number of images and videos; returns how many.

    Raises:
        UserError: naming what does not agree.
    """
    kinds: dict[tuple[int, int], Conversation] = {}
    for row in planned.rows:
        kinds.setdefault((len(row.images), sum(isinstance(one, Video) for one in row.images)), row)
    chosen = {id(row): row for row in [*planned.rows[:NUM_VERIFIED], *list(kinds.values())[:NUM_VERIFIED]]}
    for row in chosen.values():
        chat.verify_labels(row, load_images(row))
    return len(chosen)


def load_images(row: Conversation) -> list[Any]:
    """A row's images, and the chosen frames of its videos.

    Raises:
        UserError: with the row's place, for one that cannot be read.
    """
    try:
        return [load_medium(medium) for medium in row.images]
    except UserError as error:
        raise UserError(f"{row.location}: {error}") from error


def data_certificate(file: Path, planned: PlannedRows, chat: ChatTokens, num_verified: int) -> dict[str, Any]:
    """What an adapter says of the data it learned from: hashes, counts, and how many rows' labels were proven."""
    images = [image for row in planned.rows for medium in row.images for image in medium_parts(medium)]
    files = sorted(f"{describe_source(image)}:{source_bytes(image)}" for image in images)
    return {
        "file": Path(file).name,
        "sha256": data_hash(Path(file)),
        "rows": len(planned),
        "left_out_too_long": len(planned.too_long),
        "left_out_invalid": len(planned.faults),
        "truncated": planned.truncated,
        "fields_not_used": planned.unused,
        "images": len(files),
        "images_sha256": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "tokens": sum(planned.lengths),
        "tokens_learned": sum(planned.num_learned),
        "template_sha256": hashlib.sha256(str(chat.processor.chat_template).encode()).hexdigest(),
        "labels_verified_in_two_ways": num_verified,
    }


def data_hash(file: Path) -> str:
    """Hash of a data file's bytes, or of all files of a data-set folder or of a pattern."""
    if file.is_file():
        return file_hash(file)
    if not file.exists():
        return hashlib.sha256(
            "".join(f"{path.name}{file_hash(path)}" for path in data_files(file)).encode()
        ).hexdigest()
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
    more: tuple[tuple[int, int], ...] = ()
    """Of each further data set, behind the replay: its rows, and how many of them a pass takes."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the data."""
        return self.num_data + self.num_replayed + sum(seen for _, seen in self.more)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes in one pass over the data."""
        return -(-self.rows_per_epoch // self.batch_size)

    def rows(self, number: int) -> list[int]:
        """Rows of forward pass `number`."""
        epoch, turn = divmod(number, self.batches_per_epoch)
        return epoch_batches(self, epoch)[turn]


@lru_cache(maxsize=4)
def epoch_batches(sampler: Sampler, epoch: int) -> list[list[int]]:
    """All batches of one pass, every one full: the first rows come once more at the end."""
    rows = list(range(sampler.num_data))
    spare = len(sampler.lengths) - sampler.num_data
    spare -= sum(count for count, _ in sampler.more)
    first = sampler.num_data
    for number, (count, seen) in enumerate(((spare, sampler.num_replayed), *sampler.more)):
        seed = sampler.seed + 1 + 10 * number
        for at in range(epoch * seen, (epoch + 1) * seen):
            rows.append(first + permutation(seed, count, at // count)[at % count])
        first += count
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

    def __getitem__(self, number: int) -> dict[str, torch.Tensor] | str:
        """The tensors, or the sentence of what is wrong: an exception would leave a worker with its traceback for a message."""
        chosen = self.sampler.rows(number)
        own = [self.rows[chosen[slot]] for slot in self.slots]
        try:
            return shared(self.chat.collate(own, [load_images(row) for row in own]))
        except UserError as error:
            return str(error)
        except Exception as error:
            places = ", ".join(row.location for row in own[:8])
            return f"One of {places}: the base's processor fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})."


def shared(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch in shared memory where a worker made it; left to the worker's queue, a failure there would be heard by nobody.

    Raises:
        UserError: when it finds no room, or no more files can be opened.
    """
    try:
        return {name: value.share_memory_() for name, value in batch.items()} if get_worker_info() else batch
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"What a worker has read finds no place in {SHARED_MEMORY} ({text[-120:]}). {WORKERS_CURE}"
        ) from error


READ_SECONDS = 180.0  # for which a batch may be waited for
SHARED_MEMORY = "/dev/shm"
WORKERS_CURE = (
    "Containers often keep it small: put 'workers: 0' into config.yaml and resume, or begin with --workers 0."
)


class Prefetcher:
    """Batches in order, read ahead by worker processes."""

    def __init__(self, batches: ConversationBatches, workers: int, pin_memory: bool) -> None:
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory
        self.next, self.source = -1, iter(())

    def fetch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of this forward pass; cheapest when passes are asked for one after another.

        Raises:
            UserError: for an image that cannot be read, and when the workers give nothing for READ_SECONDS.
        """
        if number != self.next:
            self.source = self.start_loader(number)
        self.next = number + 1
        try:
            found = next(self.source)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise UserError(no_batch_message()) from error
        if isinstance(found, str):
            raise UserError(found)
        return found

    def start_loader(self, number: int) -> Iterator[dict[str, torch.Tensor] | str]:
        """An endless reader that begins at this forward pass."""
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(number, number + 10**9),
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
                timeout=READ_SECONDS if self.workers else 0,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # its own, or starting it would draw from the one that dropout draws from
            )
        )


def no_batch_message() -> str:
    """What is said when workers live and give nothing."""
    try:
        room = f"{shutil.disk_usage(SHARED_MEMORY).free >> 20} MiB are free in {SHARED_MEMORY}, through which they go. "
    except OSError:
        room = ""
    return f"The workers that read images have given nothing for {READ_SECONDS:g} s. {room}{WORKERS_CURE}"
