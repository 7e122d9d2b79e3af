"""Images that data files hold as bytes, kept in the cache on disk from where they would fill the memory.

A data set of any size is planned and trained on so: what stays in memory are its texts, and the paths of its images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..core.files import write_atomic
from ..core.paths import cache_folder
from .images import ImageSource
from .videos import Medium, Video

IN_MEMORY = 256 << 20  # bytes of images that stay in memory


@dataclass
class ImageStore:
    """Where the images of one data file are kept."""

    room: int = field(default_factory=lambda: IN_MEMORY)
    """Bytes that may still stay in memory."""
    on_disk: int = 0
    """Images that lie on disk."""

    def keep(self, medium: Medium) -> Medium:
        """An image or a video, its bytes on disk once there is no more room for them.

        Raises:
            UserError: when the disk is full.
        """
        if isinstance(medium, Video):
            if not isinstance(medium.source, tuple):
                return medium
            return replace(medium, source=tuple(self.keep_image(frame) for frame in medium.source))
        return self.keep_image(medium)

    def keep_all(self, media: Sequence[Medium]) -> tuple[Medium, ...]:
        """Those of a row."""
        return tuple(self.keep(medium) for medium in media)

    def keep_image(self, source: ImageSource) -> ImageSource:
        """One image; a path stays what it is."""
        if not isinstance(source, bytes):
            return source
        if len(source) <= self.room:
            self.room -= len(source)
            return source
        name = hashlib.sha256(source).hexdigest()
        file = cache_folder() / "images" / name[:2] / name
        if not file.is_file():
            write_atomic(file, source)
        self.on_disk += 1
        return file
