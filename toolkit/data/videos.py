"""Videos of rows: a file, or its frames as images in order; what they are, and the frames that a base is given.

Files are read by PyAV (the extra `video`); frames that lie beside one another as images need no library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..core.errors import UserError
from ..core.paths import is_file, natural_key, resolve_data_path
from .images import ImageSource, describe_source, load_rgb, parse_source, shorten

VIDEO_KEYS = ("video", "path", "url", "video_url", "frames", "images", "bytes")  # of a block that names a video
NO_READER = "reading a video file needs PyAV: pip install 'rankfold[video]', or give its frames as images."


class ClipSize(NamedTuple):
    """What the tokens of a video depend on."""

    width: int
    height: int
    chosen: tuple[int, ...]
    """Numbers of the frames that the base is given."""
    total: int
    """Frames of the whole video."""
    fps: float | None
    """Frames per second of the whole video, None where nobody knows."""


@dataclass(frozen=True)
class Video:
    """A video of a row."""

    source: Path | tuple[ImageSource, ...]
    """A file, or its frames in order."""
    fps: float | None = None
    """Frames per second of frames in a row, where the row says it; a file says its own."""
    size: ClipSize | None = field(default=None, compare=False)
    """Which of its frames the base is given; None before they are chosen."""

    def __str__(self) -> str:
        if isinstance(self.source, Path):
            return str(self.source)
        return f"a video of {len(self.source)} frames, from {describe_source(self.source[0])}"


Medium = ImageSource | Video


def medium_parts(medium: Medium) -> tuple[ImageSource, ...]:
    """What an image or a video is made of: one file, or frames."""
    if not isinstance(medium, Video):
        return (medium,)
    return (medium.source,) if isinstance(medium.source, Path) else medium.source


def medium_bytes(medium: Medium) -> bytes:
    """What an image or a video is, by its content."""
    return b"".join(part.read_bytes() if isinstance(part, Path) else part for part in medium_parts(medium))


@dataclass(frozen=True)
class Clip:
    """The frames of a video that a base is given, as RGB images of one size."""

    frames: tuple[Image.Image, ...]
    size: ClipSize

    def array(self) -> np.ndarray:
        """The frames as (T, height, width, 3) of 0 to 255."""
        return np.stack([np.asarray(frame) for frame in self.frames])


# ---------------------------------------------------------------------------------------------- from rows


def parse_video(value: Any, folder: Path | None, fps: float | None = None) -> Video:
    """The video behind what a row puts for one: a file, a folder of frames, a list of frames, or a block with one of these.

    Raises:
        UserError: for an address on the network, a file that is not there or needs PyAV, or anything else.
    """
    if isinstance(value, Video):
        return value
    if isinstance(value, dict):
        found = next((value[key] for key in VIDEO_KEYS if value.get(key) is not None), None)
        if found is None or isinstance(found, bytes):
            raise UserError("a video's block names no video: give it the path of a file, or a list of frames.")
        return parse_video(found, folder, parse_fps(value.get("fps")) or fps)
    if isinstance(value, (list, tuple)):
        if not value:
            raise UserError("a video has no frames.")
        return Video(tuple(parse_source(frame, folder) for frame in value), fps)
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise UserError(f"a video cannot be {shorten(repr(value))}: give its path, or a list of frames.")
    if str(value).startswith(("http://", "https://")):
        raise UserError(f"the video {shorten(str(value))} is on the network: fetch it first and give its path.")
    path = resolve_data_path(str(value), folder)
    if path.is_dir():
        frames = sorted((own for own in path.iterdir() if own.suffix.lower() in FRAME_SUFFIXES), key=natural_key)
        if not frames:
            raise UserError(f"the folder {path} holds no frames ({', '.join(FRAME_SUFFIXES)}).")
        return Video(tuple(frames), fps)
    if not is_file(path):
        raise UserError(f"there is no video {shorten(str(path))}. Is --images right?")
    if not can_read_files():
        raise UserError(f"{path}: {NO_READER}")
    return Video(path)


FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def parse_fps(value: Any) -> float | None:
    """Frames per second as a row gives them; None for nothing.

    Raises:
        UserError: for what is no number above 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"the frames per second of a video, 'fps', must be a number above 0, not {value!r}.")
    return float(value)


# ---------------------------------------------------------------------------------------------- from files


def can_read_files() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def file_frames(path: Path) -> Iterator[Image.Image]:
    """All frames of a file as they are seen, turned as the file says.

    Raises:
        UserError: when the file is no video or breaks off.
    """
    import av

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                image = frame.to_image()
                turned = getattr(frame, "rotation", 0) % 360
                yield image.rotate(turned, expand=True) if turned else image
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(
            f"{path} is not a video that can be read whole ({' '.join(str(error).split())[:120]})."
        ) from error


def file_rate(path: Path) -> float | None:
    """Frames per second that a file says it has."""
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    return float(rate) if rate else None


@dataclass(frozen=True)
class VideoFacts:
    """What a video is, known once all of it was read."""

    width: int
    height: int
    total: int
    """Frames."""
    fps: float | None


def read_facts(path: Path) -> VideoFacts:
    """What a file is; all of it is decoded.

    Raises:
        UserError: as `file_frames` does, and for a file without a frame.
    """
    size, total = (0, 0), 0
    for frame in file_frames(path):
        size, total = frame.size, total + 1
    if not total:
        raise UserError(f"{path} has no frames.")
    return VideoFacts(*size, total, file_rate(path))


def load_clip(video: Video) -> Clip:
    """The chosen frames of a video; all, where none are chosen yet.

    Raises:
        UserError: for a file or a frame that cannot be read, and frames of several sizes.
    """
    chosen = video.size.chosen if video.size else ()
    if isinstance(video.source, Path):
        found = pick_frames(video.source, set(chosen))
    else:
        found = {number: load_rgb(video.source[number]) for number in sorted(set(chosen or range(len(video.source))))}
    chosen = chosen or tuple(found)
    if missing := set(chosen) - set(found):
        raise UserError(f"{video} has no frame {min(missing)}: it has changed since it was checked.")
    frames = tuple(found[number] for number in chosen)
    if len({frame.size for frame in frames}) > 1:
        raise UserError(f"{video}: its frames are of several sizes; bring them to one.")
    total = video.size.total if video.size else len(found)
    return Clip(frames, ClipSize(*frames[0].size, chosen, total, video.size.fps if video.size else video.fps))


def pick_frames(path: Path, wanted: set[int]) -> dict[int, Image.Image]:
    """Frames of a file by their numbers; all, where none are named.

    Raises:
        UserError: as `file_frames` does.
    """
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(file_frames(path)):
        if not wanted or number in wanted:
            found[number] = frame.convert("RGB")
        if wanted and number >= max(wanted):
            break
    return found


def load_medium(medium: Medium) -> Image.Image | Clip:
    """An image, or the frames of a video.

    Raises:
        UserError: for what cannot be read.
    """
    return load_clip(medium) if isinstance(medium, Video) else load_rgb(medium)
