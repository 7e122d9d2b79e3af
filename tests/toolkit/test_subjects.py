"""Images and captions: what is found, and the one sentence for each kind of bad input."""

import json

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.image_folder import read_image_folders
from rankfold.toolkit.data.images import CAN_READ_HEIF
from rankfold.toolkit.data.subjects import Sample, check_masks, find_samples, load_image, load_mask


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name;text\n0.png;a dog\n", "needs the fields file_name and text, and has file_name;text"),
        ("file_name,text\n0.png,a dog, on grass\n", "line 2: has more fields than the first line names"),
    ],
)
def test_tables_that_would_lose_words_are_refused(tmp_path, text, said):
    image(tmp_path / "0.png", (32, 32))
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        find_samples(tmp_path)


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
    (tmp_path / "3.PSD").write_bytes(b"8BPS")
    assert [sample.path.name for sample in find_samples(tmp_path)] == ["0.png", "1.jfif", "2.avif"]
    (own,) = read_image_folders(tmp_path)
    assert list(own.left_out) == ["3.PSD"]
    for number in ("0.png", "1.jfif", "2.avif"):
        (tmp_path / number).unlink()
    with pytest.raises(UserError, match="PSD cannot be read"):
        find_samples(tmp_path)


def test_photos_of_phones(tmp_path):
    if not CAN_READ_HEIF:
        image(tmp_path / "0.png", (32, 32))
        (tmp_path / "1.HEIC").write_bytes(b"ftypheic")
        (own,) = read_image_folders(tmp_path)
        assert 'pip install "rankfold[heif]"' in own.left_out["1.HEIC"]
        return
    Image.effect_noise((64, 48), 40).convert("RGB").save(tmp_path / "1.heic")
    (sample,) = find_samples(tmp_path)
    assert load_image(sample, (32, 32), "center").size == (32, 32)


def test_folders_of_kohyas_layout_are_repeats_and_prompts(tmp_path):
    for name, files in (("10_sks dog", "01"), ("3_a sks dog, snow", "2")):
        (tmp_path / name).mkdir()
        for number in files:
            image(tmp_path / name / f"{number}.png", (32, 32))
    (tmp_path / "10_sks dog" / "1.txt").write_text("a sks dog on grass")
    found = {sample.path.name: (sample.repeats, sample.caption, sample.source) for sample in find_samples(tmp_path)}
    assert found == {
        "0.png": (10, "sks dog", "10_sks dog"),
        "1.png": (10, "a sks dog on grass", "1.txt"),
        "2.png": (3, "a sks dog, snow", "3_a sks dog, snow"),
    }
    image(tmp_path / "1.png", (32, 32))
    with pytest.raises(UserError, match=r"such as '10_sks dog' .* and beside them 1.png"):
        find_samples(tmp_path)


def test_what_is_not_used_is_named(tmp_path):
    image(tmp_path / "0.png", (32, 32))
    image(tmp_path / "1.png", (32, 32))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "2.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "0.json").write_text('{"caption": "a", "tags": ["dog"], "mask": "m.png", "note": ""}')
    (tmp_path / "1.txt").write_bytes("caf\xe9".encode("cp1252"))
    (tmp_path / "boxes.yaml").write_text("a: 1")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("file_name,text,weight\n1.png,a house,3\n2.gif,,\n")
    (own,) = read_image_folders(tmp_path)
    notes = " | ".join(own.notes())
    for part in (
        "Not used of the .json files beside images: mask, tags.",
        "1.txt is not UTF-8 and was read as Windows-1252: 'caf\xe9'",
        "1.png has another caption in metadata.csv: the one in 1.txt is used.",
        "Not used of metadata.csv: the fields weight.",
        "neither an image nor a caption of one: boxes.yaml.",
        "Of 2.gif, only the first frame",
    ):
        assert part in notes, part
    assert own.captions.empty == ["2.gif"]
    assert own.captions.texts == {"0.png": "a", "1.png": "caf\xe9"}


def test_masks_of_images_that_are_called_alike(tmp_path):
    samples = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        samples.append(Sample(tmp_path / folder / "0.png"))
        image(samples[-1].path, (32, 32))
    masks = tmp_path / "masks"
    for folder, value in ((masks, 255), (masks / "two", 128)):
        folder.mkdir()
        Image.new("L", (32, 32), value).save(folder / "0.png")
    check_masks(samples, str(masks))
    assert [load_mask(sample, str(masks), (8, 8), "center").getpixel((4, 4)) for sample in samples] == [255, 128]
    (masks / "two" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0.png would be the mask of .*one.0.png and of .*two.0.png"):
        check_masks(samples, str(masks))
    Image.new("L", (32, 32), 0).save(masks / "0.png")
    with pytest.raises(UserError, match="has no white in it"):
        check_masks(samples[:1], str(masks))


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
