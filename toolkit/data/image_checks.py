"""Images decoded once, before anything is trained on them: their sizes as they are seen, and what is wrong with them.

Several at a time, and remembered: a file that has not changed since is not opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..core.errors import UserError
from ..core.files import write_text
from ..core.paths import cache_folder
from ..core.records import read_record
from .images import READ_ERRORS, ImageSource, describe_source, is_rotated, open_image, to_rgb
from .videos import Medium, Video, medium_parts, read_facts

VERSION = 3  # of what is remembered


@dataclass(frozen=True)
class CheckedImage:
    """What was found of an image."""

    size: tuple[int, int]
    """Width and height as it is seen."""
    fault: str = ""
    """What is wrong with it, a sentence; '' for nothing."""
    frames: int = 0
    """Of a video: how many it has."""
    fps: float | None = None
    """Of a video: how many of them are a second, where that is known."""
    pages: int = 1
    """Of an image: how many its file holds, as an animation or a scan of several pages; the first is what is seen."""


class PlanMemory:
    """What was found out about a data file's images and rows, kept in the cache from one run to the next."""

    def __init__(self, file: Path) -> None:
        """file: the data file."""
        name = hashlib.sha256(str(Path(file).absolute()).encode()).hexdigest()[:24]
        self.path = cache_folder() / "planned" / f"{name}.json"
        self.known, self.used = self.load(), {}

    def load(self) -> dict[str, Any]:
        """What is remembered; nothing where the file is not there or damaged."""
        found = read_record(self.path) or {}
        known = found.get("known")
        return known if found.get("version") == VERSION and isinstance(known, dict) else {}

    def recall(self, key: str) -> Any:
        """What is remembered under a key; None for nothing."""
        found = self.known.get(key)
        if found is not None:
            self.used[key] = found
        return found

    def note(self, key: str, value: Any) -> None:
        """Remembers a value."""
        self.used[key] = value

    def save(self) -> None:
        """Keeps what was recalled or noted, if any of it is new; a cache that cannot be written to is done without."""
        if self.used == self.known:
            return
        try:
            write_text(self.path, json.dumps({"version": VERSION, "known": self.used}))
        except UserError:
            return


def check_images(sources: Iterable[Medium], memory: PlanMemory) -> dict[Medium, CheckedImage]:
    """Every image and video with what was found of it; all of a video is decoded."""
    found: dict[Medium, CheckedImage] = {}
    fresh: dict[Medium, str] = {}
    for source in dict.fromkeys(sources):
        key = image_key(source)
        match memory.recall(key):
            case [int(width), int(height), str(fault), int(frames), float() | int() | None as fps, int(pages)]:
                found[source] = CheckedImage((width, height), fault, frames, fps, pages)
            case _:
                fresh[source] = key
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore")  # of Pillow, on what is reported or of no matter
        for (source, key), one in zip(fresh.items(), pool.map(check_image, fresh), strict=True):
            found[source] = one
            memory.note(key, [*one.size, one.fault, one.frames, one.fps, one.pages])
    return found


def image_key(source: Medium) -> str:
    """What changes when an image or a video does: for a file its path, size and time."""
    if isinstance(source, Video):
        parts = " ".join(image_key(part) for part in medium_parts(source))
        return f"video {source.fps} {hashlib.sha256(parts.encode()).hexdigest()[:32]}"
    if isinstance(source, bytes):
        return f"image {hashlib.sha256(source).hexdigest()[:32]}"
    try:
        facts = source.stat()
    except OSError:
        return f"image {source.absolute()}"
    return f"image {source.absolute()} {facts.st_size} {facts.st_mtime_ns}"


def check_video(video: Video) -> CheckedImage:
    """Decodes a video, or each of its frames; never raises."""
    if isinstance(video.source, Path):
        try:
            facts = read_facts(video.source)
        except UserError as error:
            return CheckedImage((0, 0), str(error))
        return CheckedImage((facts.width, facts.height), "", facts.total, facts.fps)
    frames = [check_image(frame) for frame in dict.fromkeys(video.source)]
    fault = next((frame.fault for frame in frames if frame.fault), "")
    if not fault and len({frame.size for frame in frames}) > 1:
        fault = f"{video}: its frames are of several sizes; bring them to one."
    return CheckedImage(frames[0].size, fault, len(video.source), video.fps)


def check_image(source: Medium) -> CheckedImage:
    """Decodes an image, small where its format can be, or a video; never raises."""
    if isinstance(source, Video):
        return check_video(source)
    size, pages = (0, 0), 1
    try:
        with open_image(source) as image:
            size = (image.height, image.width) if is_rotated(image, source) else image.size
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                return CheckedImage(size, too_large(source, image.width * image.height))
            if image.format == "JPEG":
                image.draft(None, (image.width // 8, image.height // 8))  # type: ignore[arg-type]
                image.load()
            else:
                to_rgb(ImageOps.exif_transpose(image))
                pages = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))  # a phone's holds a preview
    except Image.DecompressionBombError:
        return CheckedImage(size, too_large(source, 0))
    except (*READ_ERRORS, MemoryError):
        return CheckedImage(
            size, f"{describe_source(source)} is not a valid image (truncated, or another kind of file)."
        )
    return CheckedImage(size, pages=pages)


def too_large(source: ImageSource, pixels: int) -> str:
    """What is said of an image that Pillow does not open for its size."""
    more = f" ({pixels / 1e6:.0f} million)" if pixels else ""
    return f"{describe_source(source)} unpacks to far more pixels than its size suggests{more}: save it smaller."
