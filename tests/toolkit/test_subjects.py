"""Images and captions: what is found, and the one sentence for each kind of bad input."""

import json

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import Sample, find_samples, load_image


def image(path, size=(80, 64), colour="red", mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_captions_from_text_files_and_metadata(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.jpg")
    image(tmp_path / "c.webp")
    (tmp_path / "a.txt").write_text("a sks creature asleep\n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": "a sks creature awake"}) + "\n")
    captions = {s.path.name: s.caption for s in find_samples(tmp_path)}
    assert captions == {"a.png": "a sks creature asleep", "b.jpg": "a sks creature awake", "c.webp": None}


def test_flip_doubles(tmp_path):
    image(tmp_path / "a.png")
    assert [s.flip for s in find_samples(tmp_path, flip=True)] == [False, True]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: None, "is empty"),
        (lambda d: (d / "notes.md").write_text("x"), "holds no images"),
        (lambda d: (d / "a.png").write_bytes(b"not an image"), "a.png: is not a valid image"),
        (lambda d: image(d / "tiny.png", (1, 1)), "tiny.png: is 1 x 1 pixels"),
        (lambda d: image(d / "long.png", (20000, 20)), "20000 x 20 pixels"),
        (lambda d: (image(d / "a.png"), (d / "b.txt").write_text("x")), "b.txt is a caption without an image"),
        (
            lambda d: (image(d / "a.png"), (d / "metadata.jsonl").write_text('{"file_name": "z.png", "text": "x"}')),
            "z.png",
        ),
        (lambda d: (image(d / "a.png"), (d / "metadata.jsonl").write_text("{")), "line 1"),
    ],
)
def test_bad_folders(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        find_samples(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        find_samples(tmp_path / "nowhere")


def test_truncated_image_is_named_and_skipped_on_wish(tmp_path):
    whole = image(tmp_path / "whole.jpg", (200, 200))
    (tmp_path / "broken.jpg").write_bytes(whole.read_bytes()[:400])
    with pytest.raises(UserError, match=r"broken\.jpg.*--skip-bad"):
        find_samples(tmp_path)
    assert [s.path.name for s in find_samples(tmp_path, skip_bad=True)] == ["whole.jpg"]


def test_decompression_bomb(tmp_path):
    image(tmp_path / "bomb.png", (16000, 12000), 0, "1")
    with pytest.raises(UserError, match="decompression bomb"):
        find_samples(tmp_path)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 80), "red")
    image.paste("blue", (0, 0, 40, 40))  # blue above red as stored
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    shown = load_image(Sample(tmp_path / "a.png"), (40, 40), "pad")
    assert shown.getpixel((20, 4)) == (255, 0, 0)
    assert shown.getpixel((20, 36)) == (0, 0, 255)


def test_transparency_becomes_white(tmp_path):
    image(tmp_path / "a.png", colour=(255, 0, 0, 0), mode="RGBA")
    assert load_image(Sample(tmp_path / "a.png"), (32, 32), "center").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "LA"])
def test_other_modes(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image(path, mode=mode, colour=0)
    assert find_samples(tmp_path)
    assert load_image(Sample(path), (32, 32), "center").mode == "RGB"


def test_crop_and_pad_and_flip(tmp_path):
    image = Image.new("RGB", (90, 30), "white")
    image.paste("red", (0, 0, 30, 30))
    image.save(tmp_path / "a.png")
    assert load_image(Sample(tmp_path / "a.png"), (30, 30), "center").getpixel((15, 15)) == (255, 255, 255)
    padded = load_image(Sample(tmp_path / "a.png"), (30, 30), "pad")
    assert padded.getpixel((3, 15))[1] < 60
    mirrored = load_image(Sample(tmp_path / "a.png", flip=True), (30, 30), "pad")
    assert mirrored.getpixel((26, 15))[1] < 60
