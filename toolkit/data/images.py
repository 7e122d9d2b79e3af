"""Images from files, bytes and data sets, of any mode and orientation, as RGB."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import UserError
from ..core.paths import is_file, resolve_data_path

ImageSource = Path | bytes
HEIF_SUFFIXES = (".heic", ".heif")
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "AVIF",
    "BMP",
    "DIB",
    "TIFF",
    "GIF",
    "HEIF",
)  # that are opened, in Pillow's names
CAN_READ_HEIF = importlib.util.find_spec("pillow_heif") is not None
if CAN_READ_HEIF:
    importlib.import_module("pillow_heif").register_heif_opener()
MANY_PIXELS = 1 << 24  # which any file may have
MOST_PER_BYTE = 1000  # pixels in a byte of a file with more: a photo has less than 100, a drawing in one colour 340
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")  # 16 bit grey
ROTATED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that lie on their side
IMAGE_KEYS = ("image", "bytes", "path", "url", "image_url", "base64")  # of a block that names an image
READ_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    IndexError,
    TypeError,
    KeyError,
    OverflowError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)  # what Pillow raises for no image
ORIENTATION = 0x0112
MAX_SHOWN = 200  # characters of what a user gave, in an error
MIN_BASE64 = 64  # characters below which a text is a path
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def open_image(source: ImageSource) -> Image.Image:
    """The image, its header read and its pixels not, if it is of one of FORMATS whatever its name says.

    Pillow knows many more, and hands some to other programs (PostScript to Ghostscript).

    Raises:
        Image.DecompressionBombError: for a small file that says to hold a very large image.
    """
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known_formats())
    pixels = image.width * image.height
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if pixels > max(MANY_PIXELS, size * MOST_PER_BYTE):
        image.close()
        raise Image.DecompressionBombError(f"{pixels} pixels in {size} bytes")
    return image


@cache
def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_rgb(source: ImageSource) -> Image.Image:
    """The first frame as RGB: turned as EXIF says, transparency on white, 16 bit brought to 8.

    Raises:
        UserError: for what is not a valid image, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(source) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{describe_source(source)} unpacks to far more pixels than its size suggests.") from error
    except READ_ERRORS as error:
        raise UserError(
            f"{describe_source(source)} is not a valid image (truncated, or another kind of file)."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB. Pillow itself would clip 16 bit greys to white and lay transparency on whatever colour is under it."""
    if image.mode in SIXTEEN_BIT_MODES:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        most = next((white for white in (1, 255) if values.max() <= white and (image.mode == "F" or white > 1)), 65535)
        image = Image.fromarray((values.clip(0, most) * 255 / most).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) as the image is seen, from its header alone.

    Raises:
        UserError: for what is not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_image(source) as image:
                return (image.height, image.width) if is_rotated(image, source) else image.size
    except (*READ_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f"{describe_source(source)} is not an image that can be read.") from error


def is_rotated(image: Image.Image, source: ImageSource) -> bool:
    """Whether EXIF says to turn an opened image by a right angle."""
    if image.format == "TIFF":  # Pillow has turned its size already
        return False
    if (
        image.format == "PNG" and "exif" not in image.info
    ):  # it may stand behind the pixels, which Pillow would decode to get there
        whole = source.read_bytes() if isinstance(source, Path) else source
        if b"eXIf" not in whole:
            return False
    return image.getexif().get(ORIENTATION, 1) in ROTATED_ORIENTATIONS


def describe_source(source: ImageSource) -> str:
    """What an error calls a source."""
    return str(source) if isinstance(source, Path) else f"an image of {len(source)} bytes"


def parse_source(value: Any, folder: Path | None) -> ImageSource:
    """The source behind what data files put for an image: a path, a data URL, bytes, a block with one of these, a PIL image.

    folder: what relative paths start from.

    Raises:
        UserError: for an address on the network, a file that is not there, or anything else.
    """
    if isinstance(value, dict):
        for key in IMAGE_KEYS:
            if value.get(key) is not None:
                return decode_data_url(f",{value[key]}") if key == "base64" else parse_source(value[key], folder)
        raise UserError("an image's block names no image: give it a path.")
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        to_rgb(ImageOps.exif_transpose(value)).save(buffer, format="png")
        return buffer.getvalue()
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise UserError(f"an image cannot be {shorten(repr(value))}: give its path.")
    if isinstance(value, str) and value.startswith("data:"):
        return decode_data_url(value)
    if str(value).startswith(("http://", "https://")):
        raise UserError(f"the image {shorten(str(value))} is on the network: fetch it first and give its path.")
    if isinstance(value, str) and (raw := decode_bare_base64(value)) is not None:
        return raw
    path = resolve_data_path(str(value), folder)
    if not is_file(path):
        raise UserError(f"there is no image {shorten(str(path))}. Is --images right?")
    return path


def shorten(text: str) -> str:
    """A text as an error shows it: whole, or its beginning."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def decode_bare_base64(text: str) -> bytes | None:
    """The image that a text is in base64 without any prefix; None for a path, or anything else."""
    if len(text) < MIN_BASE64:
        return None
    try:
        raw = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
    return raw if raw.startswith(IMAGE_STARTS) else None


def decode_data_url(url: str) -> bytes:
    """The bytes of a data URL, whose base64 may be broken into lines."""
    try:
        return base64.b64decode("".join(url.split(",", 1)[1].split()), validate=True)
    except (IndexError, ValueError) as error:
        raise UserError("an image given as data is not valid base64.") from error
