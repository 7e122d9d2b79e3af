"""What a base is given of a video: which of its frames, as which tokens, and how a batch of rows with videos is put together.

Frames are chosen by the base's own rule (its video processor's frames per second, or number of frames), or all of them where a row gives
frames; a limit takes fewer, evenly. Where nobody knows the frames per second, ASSUMED_RATE is used, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..core.errors import UserError
from ..data.videos import Clip, ClipSize, VideoFacts

DEFAULT_FRAMES = 8  # of a video file, where the base's processor has no rule
ASSUMED_RATE = 24.0  # frames per second of a video that says none
QWEN_RATE = (
    2.0  # frames a second that are taken where a processor has limits of their number and no rate: qwen-vl-utils' FPS
)
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # one value per token


class VideoTokens:
    """What the marks of videos become."""

    def __init__(
        self, processor: Any, *, limit: int | None = None, takes_video: bool = True, equal_length: bool = False
    ) -> None:
        """limit: most frames of a video; takes_video: whether the model takes any; equal_length: whether it takes videos of one number
        of frames alone, so that each has as many.
        """
        self.processor, self.limit, self.takes_video, self.equal_length = processor, limit, takes_video, equal_length
        self.remember()

    def remember(self) -> None:
        """Starts with an empty memory."""
        self.replacement = lru_cache(maxsize=4096)(self.find_replacement)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned, and read videos with a memory of their own."""
        return {key: value for key, value in vars(self).items() if key != "replacement"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.remember()

    @property
    def reader(self) -> Any:
        """The base's video processor, None where it takes no video."""
        return getattr(self.processor, "video_processor", None)

    @property
    def mark(self) -> str | None:
        """What the chat template writes for a video; None where the base takes none."""
        return getattr(self.processor, "video_token", None) if self.reader is not None and self.takes_video else None

    @property
    def stand_beside_images(self) -> bool:
        """Whether one row may have images and videos: not where the processor gives both under one name."""
        both = (self.processor.image_processor, self.reader)
        names = [set(getattr(one, "model_input_names", ())) for one in both]
        return not names[0] & names[1]

    @property
    def may_differ(self) -> bool:
        """Whether videos of one row may have different numbers of frames: where patches lie one behind the other, as Qwen's."""
        return "video_grid_thw" in getattr(self.reader, "model_input_names", ())

    # ------------------------------------------------------------------------------------ frames

    def choose(self, facts: VideoFacts, *, whole: bool) -> ClipSize:
        """The frames of a video that the base is given. whole: its frames were given, so all are, up to the limit.

        Raises:
            UserError: when the base's rule takes none.
        """
        rate, total = facts.fps or ASSUMED_RATE, facts.total
        own = getattr(self.reader, "num_frames", None)
        taken = getattr(self.reader, "fps", None) or (QWEN_RATE if getattr(self.reader, "min_frames", None) else None)
        if self.equal_length:
            chosen = spread(total, self.limit or own or DEFAULT_FRAMES)
        elif whole:
            chosen = list(range(total))
        elif own or taken:
            chosen = self.by_own_rule(facts, rate, {"num_frames": min(own, total)} if own else {"fps": taken})
        else:
            chosen = spread(total, min(total, DEFAULT_FRAMES))
        if self.limit and len(chosen) > self.limit:
            chosen = [chosen[at] for at in spread(len(chosen), self.limit)]
        return ClipSize(facts.width, facts.height, tuple(chosen), total, rate)

    def by_own_rule(self, facts: VideoFacts, rate: float, asked: dict[str, float]) -> list[int]:
        """The frames that the base's processor takes of a file with `rate` frames a second. asked: how many, or how many a second.

        Raises:
            UserError: when it takes none.
        """
        try:
            about = metadata(facts.width, facts.height, facts.total, rate, None)
            found = self.reader.sample_frames(metadata=about, **asked)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"the base's processor takes no video of {facts.total} frames at {rate:g} a second ({' '.join(str(error).split())[:160]})."
            ) from error
        chosen = [int(number) for number in found]
        if not chosen:
            raise UserError(
                f"the base's processor takes no frame of a video of {facts.total} frames at {rate:g} a second."
            )
        return chosen

    # ------------------------------------------------------------------------------------ texts

    def find_replacement(self, size: ClipSize) -> str:
        """What the mark of a video of this size becomes.

        Raises:
            UserError: when the processor takes no such video.
        """
        blank = np.zeros((len(size.chosen), size.height, size.width, 3), dtype=np.uint8)
        try:
            out = self.processor(
                text=[self.mark],
                **self.arguments([blank], [size]),
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except Exception as error:
            raise UserError(
                f"the base's processor does not take a video of {len(size.chosen)} frames of {size.width} x {size.height} pixels: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        return out["text_replacement_offsets"][0][0]["replacement"]

    def arguments(self, frames: Sequence[np.ndarray], sizes: Sequence[ClipSize]) -> dict[str, Any]:
        """What the processor is given for videos whose frames are chosen; {} for none."""
        if not frames:
            return {}
        about = [metadata(size.width, size.height, size.total, size.fps, list(size.chosen)) for size in sizes]
        return {"videos": list(frames), "video_metadata": about, "do_sample_frames": False}

    def clip_arguments(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """The same for clips."""
        return self.arguments([clip.array() for clip in clips], [clip.size for clip in clips])


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` numbers, evenly; some more than once where there are fewer."""
    return [at * total // count for at in range(count)]


def metadata(width: int, height: int, total: int, rate: float | None, chosen: list[int] | None) -> Any:
    """What transformers knows of a video."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=total,
        fps=rate,
        width=width,
        height=height,
        duration=total / rate if rate else None,
        frames_indices=chosen,
    )


def join_rows(rows: Sequence[dict[str, torch.Tensor]], pad_id: int, *, left: bool) -> dict[str, torch.Tensor]:
    """Inputs of rows that were processed one by one as one batch: tokens, (1, L) each, padded on one side, images and frames one
    behind the other, (1, N, ...) each padded with zeros to the largest N, as processors do.

    Processors that are given several rows with videos at once want one number of frames in all, and some lose the images beside them.
    """
    joined: dict[str, torch.Tensor] = {}
    length = max(row["input_ids"].shape[1] for row in rows)
    for key in dict.fromkeys(key for row in rows for key in row):
        parts = [row[key] for row in rows if key in row]
        if key in TOKEN_KEYS:
            gaps = [length - part.shape[1] for part in parts]
            value = pad_id if key == "input_ids" else 0
            parts = [
                F.pad(part, (gap, 0) if left else (0, gap), value=value) for part, gap in zip(parts, gaps, strict=True)
            ]
        elif parts[0].dim() >= 4:
            most = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (*(0, 0) * (part.dim() - 2), 0, most - part.shape[1])) for part in parts]
        joined[key] = torch.cat(parts)
    return joined
