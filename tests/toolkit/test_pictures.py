"""Images of every mode, orientation and source, and the one sentence for what is none."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, features

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.images import image_size, load_rgb, parse_source

SIZE = (8, 4)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def quarters():
    """Red and green above blue and white."""
    image = Image.new("RGB", SIZE, "red")
    image.paste(GREEN, (4, 0, 8, 2))
    image.paste(BLUE, (0, 2, 4, 4))
    image.paste(WHITE, (4, 2, 8, 4))
    return image


def encode_image(image, kind="png", **options):
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def encode_rotated(orientation, kind="png"):
    """The bytes of a file that says how its image is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_image(quarters(), kind, exif=exif)


def grey(source):
    """The values of an image without colour, row by row."""
    pixels = np.asarray(load_rgb(source)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel()


@pytest.mark.parametrize(
    ("orientation", "corner"),
    list(enumerate([RED, GREEN, WHITE, BLUE, RED, BLUE, WHITE, GREEN], 1)),
)
def test_exif_orientation(orientation, corner):
    """The standard's table: which corner of what is stored comes to lie at the upper left."""
    seen = load_rgb(encode_rotated(orientation))
    assert seen.getpixel((0, 0)) == corner
    assert seen.size == (SIZE if orientation < 5 else SIZE[::-1])


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8, 9])
def test_the_header_tells_the_size_that_is_seen(kind, orientation):
    source = encode_rotated(orientation, kind)
    assert image_size(source) == load_rgb(source).size


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk(kind):
    seen = np.asarray(load_rgb(encode_image(Image.new("CMYK", SIZE, (0, 255, 255, 0)), kind))).astype(int)
    assert abs(seen - RED).max() < 8


def test_palette_with_transparency():
    image = Image.new("P", SIZE, 0)
    image.putpalette([10, 20, 30, 255, 0, 0])
    image.putpixel((1, 0), 1)
    seen = load_rgb(encode_image(image, transparency=0))
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == (WHITE, RED)


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), WHITE),
        ("LA", (0, 128), (127, 127, 127)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, WHITE),
    ],
)
def test_transparency_lies_on_white(mode, colour, seen):
    assert load_rgb(encode_image(Image.new(mode, SIZE, colour))).getpixel((3, 3)) == seen


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_ramp_of_16_bits_stays_a_ramp(kind):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    source = encode_image(Image.fromarray(values), kind)
    with Image.open(io.BytesIO(source)) as stored:
        assert stored.mode.startswith("I;16")
    assert grey(source).tolist() == list(range(256))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("most", [255, 65535])
def test_a_ramp_of_wide_numbers_stays_a_ramp(kind, most):
    source = encode_image(Image.fromarray(np.linspace(0, most, 256).astype(kind).reshape(16, 16)), "tiff")
    with Image.open(io.BytesIO(source)) as stored:
        assert stored.mode == {np.int32: "I", np.float32: "F"}[kind]
    assert abs(grey(source) - np.arange(256)).max() <= 1


def test_a_ramp_from_0_to_1_stays_a_ramp():
    """Fractions, as most programs write images of floating point numbers."""
    source = encode_image(Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)), "tiff")
    assert abs(grey(source) - np.arange(256)).max() <= 1


def test_first_frame_of_an_animation():
    more = [Image.new("RGB", SIZE, colour) for colour in ("blue", "white")]
    source = encode_image(Image.new("RGB", SIZE, "red"), "gif", save_all=True, append_images=more)
    assert load_rgb(source).getpixel((0, 0)) == RED
    assert image_size(source) == SIZE


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "bmp", "gif"])
def test_truncated_files(tmp_path, kind):
    path = tmp_path / f"cut.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.write_bytes(encode_image(Image.fromarray(noise), kind)[:-1500])
    with pytest.raises(UserError, match=rf"cut\.{kind} is not a valid image"):
        load_rgb(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_a_damaged_avif():
    whole = encode_image(quarters(), "avif")
    for damaged in (whole.replace(b"pitm", b"xxxx"), whole.replace(b"iloc", b"xxxx"), whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="is not a valid image"):
            load_rgb(damaged)


@pytest.mark.parametrize("text", [b"not an image", b""])
def test_another_kind_of_file(tmp_path, text):
    path = tmp_path / "notes.png"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"notes\.png is not a valid image"):
        load_rgb(path)
    with pytest.raises(UserError, match=r"notes\.png is not an image that can be read"):
        image_size(path)
    with pytest.raises(UserError, match=f"an image of {len(text)} bytes is not"):
        load_rgb(text)


@pytest.mark.parametrize("most", [24, 10])
def test_decompression_bombs(monkeypatch, most):
    """Pillow only warns until twice the bound: 32 pixels lie between, and beyond it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(UserError, match="far more pixels"):
        load_rgb(encode_image(quarters()))


@pytest.mark.parametrize("key", ["image", "bytes", "path", "url", "image_url"])
@pytest.mark.parametrize("kind", ["name", "file", "bytes", "data", "picture", "block"])
def test_sources(tmp_path, kind, key):
    """Whatever a data file puts, bare or in a block, shows the same image."""
    whole = encode_image(quarters())
    (tmp_path / "a.png").write_bytes(whole)
    given = {
        "name": "a.png",
        "file": f"file://{tmp_path}/a.png",
        "bytes": whole,
        "data": "data:image/png;base64," + base64.b64encode(whole).decode(),
        "picture": quarters(),
        "block": {"url": str(tmp_path / "a.png")},
    }[kind]
    for value in (given, {"type": "image", key: given, "detail": None}):
        assert load_rgb(parse_source(value, tmp_path)).tobytes() == quarters().tobytes()


def test_base64_in_a_block():
    text = base64.b64encode(encode_image(quarters())).decode()
    assert load_rgb(parse_source({"type": "image", "base64": text}, None)).tobytes() == quarters().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_images_of_any_mode_as_source(mode):
    assert load_rgb(parse_source(Image.new(mode, SIZE), None)).size == SIZE


def test_a_image_that_was_opened_keeps_its_orientation():
    with Image.open(io.BytesIO(encode_rotated(6, "jpeg"))) as image:
        assert load_rgb(parse_source(image, None)).size == SIZE[::-1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.png", "there is no image"),
        (".", "there is no image"),
        ("x" * 300, "there is no image"),
        ("http://localhost/a.png", "is on the network: fetch it first and give its path"),
        ({"image_url": {"url": "https://localhost/a.png"}}, "is on the network"),
        ("data:image/png;base64", "not valid base64"),
        ("data:image/png;base64,abc*", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,ü", "not valid base64"),
        ({"type": "image"}, "names no image"),
        ("", "cannot be ''"),
        (None, "cannot be None"),
        (3, "cannot be 3"),
        (["a.png"], "cannot be ['a.png']"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, value, words):
    with pytest.raises(UserError) as error:
        parse_source(value, tmp_path)
    assert words in str(error.value)


def test_a_missing_folder_is_suggested():
    with pytest.raises(UserError, match="Is --images"):
        parse_source("nowhere.png", None)
