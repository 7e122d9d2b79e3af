"""Adapters as cards: an image of what each makes, its name, base and trigger words."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import suppress

from PIL import Image

from ....toolkit.data.images import READ_ERRORS
from ....toolkit.diffusion.base_files import short_base
from ....training.runs import library
from .adapter_list import AdapterEntry
from .generated import thumbnail
from .paths import StudioPaths


def adapter_cards(found: Iterable[AdapterEntry], paths: StudioPaths) -> list[tuple[Image.Image, str]]:
    """A card for each adapter: an image of what it makes, its name, base and trigger."""
    return [
        (card_image(one, paths), " · ".join([one.name, *filter(None, (short_base(one.facts.base), one.trigger))]))
        for one in found
    ]


def card_image(one: AdapterEntry, paths: StudioPaths) -> Image.Image:
    """The newest preview of an adapter's run, its thumbnail in the library, or a plain tile."""
    if one.run is None:
        entry = library.read_entry(one.path.parent)
        file = entry.thumbnail if entry else None
    else:
        file = library.newest_preview(paths.runs / one.run)
    if file is not None:
        # Not the path: the library may lie in a hidden folder, of which Gradio shows nothing.
        with suppress(*READ_ERRORS, Image.DecompressionBombError):
            return thumbnail(file, file.stat().st_mtime_ns)
    return plain_tile(one.name)


def plain_tile(name: str) -> Image.Image:
    """A tile in a colour of its own."""
    hue = zlib.crc32(name.encode()) % 360
    return Image.new("RGB", (160, 160), f"hsl({hue}, 35%, 62%)")
