"""Images and captions: what is found, and the one sentence for each kind of bad input."""

import json

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.subjects import Sample, check_masks, find_samples, load_image, load_mask, unreadable_images


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
    with pytest.raises(UserError, match="192 megapixels"):
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


# ---------------------------------------------------------------------------------------------- what people have


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0.caption", "a sks dog on grass"),
        ("0.json", '{"caption": "a sks dog on grass", "tags": ["dog"]}'),
        ("metadata.csv", "file_name,text\n0.png,a sks dog on grass\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "caption": "a sks dog on grass"}\n'),
    ],
)
def test_captions_of_every_tool(tmp_path, name, text):
    image(tmp_path / "0.png", (32, 32))
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert find_samples(tmp_path) == [Sample(tmp_path / "0.png", "a sks dog on grass")]


def test_two_captions_that_differ_are_refused(tmp_path):
    image(tmp_path / "0.png", (32, 32))
    (tmp_path / "0.txt").write_text("a dog")
    (tmp_path / "0.caption").write_text("a cat")
    with pytest.raises(UserError, match=r"0.caption and 0.txt in .* say something else of 0.png"):
        find_samples(tmp_path)


def test_images_of_other_kinds(tmp_path):
    image(tmp_path / "0.png", (32, 32))
    Image.open(tmp_path / "0.png").convert("RGB").save(tmp_path / "1.jfif", format="JPEG")
    Image.open(tmp_path / "0.png").convert("RGB").save(tmp_path / "2.avif")
    (tmp_path / "3.HEIC").write_bytes(b"ftypheic")
    assert [sample.path.name for sample in find_samples(tmp_path)] == ["0.png", "1.jfif", "2.avif"]
    assert unreadable_images(tmp_path) == ["3.HEIC"]
    for number in ("0.png", "1.jfif", "2.avif"):
        (tmp_path / number).unlink()
    with pytest.raises(UserError, match="HEIC cannot be read"):
        find_samples(tmp_path)


def test_folders_of_kohyas_layout_are_named(tmp_path):
    inner = tmp_path / "10_sks dog"
    inner.mkdir()
    image(inner / "0.png", (32, 32))
    for beside in (False, True):
        if beside:
            image(tmp_path / "1.png", (32, 32))
        with pytest.raises(UserError, match=r"holds folders with images: 10_sks dog .10 repeats of 'sks dog'"):
            find_samples(tmp_path)


def test_other_folders_are_no_fault_beside_images(tmp_path):
    image(tmp_path / "1.png", (32, 32))
    masks = tmp_path / "masks"
    masks.mkdir()
    image(masks / "1.png", (32, 32))
    assert [sample.path.name for sample in find_samples(tmp_path)] == ["1.png"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="holds folders with images: masks"):
        find_samples(tmp_path)


def test_a_mask_is_laid_on_the_photo_as_it_is_seen(tmp_path):
    photo = Image.new("RGB", (96, 64), "grey")
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    masks = tmp_path / "masks"
    masks.mkdir()
    (sample,) = [Sample(tmp_path / "a.jpg")]
    Image.new("L", (96, 64), 255).save(masks / "a.png")
    with pytest.raises(UserError, match="96 x 64 pixels and its image, as it is seen, 64 x 96"):
        check_masks([sample], str(masks))
    Image.new("L", (64, 96), 255).save(masks / "a.png")
    check_masks([sample], str(masks))


@pytest.mark.parametrize("colour", [(255, 255, 255), (10, 20, 30)])
def test_a_mask_may_be_the_alpha_of_its_file(tmp_path, colour):
    image(tmp_path / "0.png", (64, 64))
    masks = tmp_path / "masks"
    masks.mkdir()
    alpha = Image.new("L", (64, 64), 0)
    alpha.paste(255, (16, 16, 48, 48))
    mask = Image.new("RGB", (64, 64), colour)
    mask.putalpha(alpha)
    mask.save(masks / "0.png")
    assert load_mask(Sample(tmp_path / "0.png"), str(masks), (64, 64), "center").tobytes() == alpha.tobytes()
