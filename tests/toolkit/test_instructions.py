"""Conversations from files: every format, every container, and the one sentence for each mistake."""

import base64
import json

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.conversations import IMAGE_MARK, read_conversations
from rankfold.toolkit.data.images import load_rgb

COLOURS = {"a.png": (255, 0, 0), "b.png": (0, 0, 255)}
PLAIN = {"question": "Why?", "answer": "So."}
PLAIN_TOLD = ["user: Why?", "assistant: So."]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two images, and a cache for tables beside them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    return tmp_path


def read(folder, *rows, **options):
    """What rows of a JSON file become."""
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_conversations(folder / "data.json", folder, **options)


def messages_as_text(row):
    """Messages as 'role: text', marks where the images stand."""
    parts = [[part.get("text", IMAGE_MARK) for part in message["content"]] for message in row.messages]
    return [f"{message['role']}: {''.join(words)}" for message, words in zip(row.messages, parts, strict=True)]


def image_names(row):
    """Names of a row's images, by their colours."""
    names = {colour: name[0] for name, colour in COLOURS.items()}
    return "".join(names[load_rgb(image).getpixel((0, 0))] for image in row.images)


def user(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]


def human(value, answer="So."):
    return [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]


def block(**fields):
    return [{"type": "image", **fields}, {"type": "text", "text": " Why? "}]


SEEN = ["user: <image>Why?", "assistant: So."]
BLANKS = ["user: <image> Why? ", "assistant: So."]


@pytest.mark.parametrize(
    ("row", "words", "images"),
    [
        ({"image": "a.png", "conversations": human("<image>\nWhy?")}, SEEN, "a"),
        ({"image": "a.png", "conversations": human("Why?\n<image>")}, ["user: Why?<image>", SEEN[1]], "a"),
        ({"image": "a.png", "conversations": human("Why?")}, SEEN, "a"),
        ({"images": ["b.png", "a.png"], "conversations": human("<image>Or<image>?")}, ["user: <image>Or<image>?", SEEN[1]], "ba"),
        ({"images": ["a.png", "b.png"], "conversations": human("Why?")}, ["user: <image><image>Why?", SEEN[1]], "ab"),
        ({"conversations": human("Why?")}, PLAIN_TOLD, ""),
        ({"images": ["a.png"], "messages": user("<image>Why?")}, SEEN, "a"),
        ({"images": ["a.png"], "messages": user(block())}, BLANKS, "a"),
        ({"images": ["a.png", "b.png"], "messages": user("<image>?") + user("<image>!")},
         ["user: <image>?", "assistant: So.", "user: <image>!", "assistant: So."], "ab"),
        ({"image": "a.png", "messages": [{"role": "system", "content": "Be kind."}, *user("Why?")]}, ["system: Be kind.", *SEEN], "a"),
        ({"messages": user(block(image="a.png"))}, BLANKS, "a"),
        ({"messages": user(block(path="a.png", text=None))}, BLANKS, "a"),
        ({"image": "a.png", **PLAIN}, SEEN, "a"),
        ({"image": "a.png", "question": "Why?", "answers": ["So.", "Thus."]}, SEEN, "a"),
        ({"question": "Why?", "answer": 3}, ["user: Why?", "assistant: 3"], ""),
        ({**PLAIN, "image": None, "images": None, "conversations": None, "messages": None}, PLAIN_TOLD, ""),
        # Blocks as in the table llava-instruct-mix-vsft: which of the images beside stands there.
        ({"images": ["a.png"], "messages": user(block(index=0, text=None))}, BLANKS, "a"),
        ({"images": ["a.png"], "messages": user([{"type": "text", "text": "<image>\nWhy?"}])}, SEEN, "a"),
        ({"images": [], "image": "a.png", **PLAIN}, SEEN, "a"),
        ({"question": "Why?", "answers": "So."}, PLAIN_TOLD, ""),
    ],
)  # fmt: skip
def test_every_format_becomes_the_same_messages(folder, row, words, images):
    [got] = read(folder, row).rows
    assert (messages_as_text(got), image_names(got)) == (words, images)


def test_images_in_a_block_as_data(folder):
    url = "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
    blocks = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]
    [row] = read(folder, {"messages": user(blocks)}).rows
    assert (messages_as_text(row), image_names(row)) == (SEEN, "a")
    assert isinstance(row.images[0], bytes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", json.dumps([PLAIN, PLAIN])),
        ("x.json", "\ufeff" + json.dumps({"data": [PLAIN, PLAIN]})),
        ("x.jsonl", f"{json.dumps(PLAIN)}\n{json.dumps(PLAIN)}"),
        ("x.jsonl", f"\ufeff{json.dumps(PLAIN)}\r\n\r\n{json.dumps(PLAIN)}\r\n"),
    ],
)
def test_text_files(folder, name, text):
    (folder / name).write_bytes(text.encode())
    assert [messages_as_text(row) for row in read_conversations(folder / name).rows] == [PLAIN_TOLD] * 2


def table(folder):
    """A table with two images as pixels in row 1, a text in row 2, and messages in row 3 that are null elsewhere."""
    import datasets

    images = [Image.open(folder / name) for name in COLOURS]
    columns = {
        "images": [images, None, images[:1]],
        "question": ["<image><image>Why?", "Why?", None],
        "answer": ["So.", "So.", None],
        "messages": [None, None, [{"role": turn["role"], "content": turn["content"], "name": None} for turn in user("Why?")]],
    }  # fmt: skip
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_tables(folder, kind):
    made, place = table(folder), folder / f"x.{kind}"
    made.to_parquet(place) if kind == "parquet" else made.save_to_disk(place)
    rows = read_conversations(place).rows
    assert [messages_as_text(row) for row in rows] == [["user: <image><image>Why?", "assistant: So."], PLAIN_TOLD, SEEN]
    assert [image_names(row) for row in rows] == ["ab", "", "a"]


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_images_deep_in_a_table(folder, mode):
    """Images in the blocks of messages, which the library datasets unpacks on its own."""
    import datasets

    Image.open(folder / "a.png").convert(mode).save(folder / "a.tif")
    text, pixels = datasets.Value("string"), datasets.Image()
    part = {"type": text, "text": text, "image": pixels}
    kinds = datasets.Features(messages=datasets.List({"role": text, "content": datasets.List(part)}))
    asked = [{"type": "image", "image": str(folder / "a.tif")}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "So."}]}]
    datasets.Dataset.from_list([{"messages": messages}], features=kinds).to_parquet(folder / "x.parquet")
    [row] = read_conversations(folder / "x.parquet").rows
    assert messages_as_text(row) == SEEN
    assert load_rgb(row.images[0]).getpixel((0, 0))[0] > 200


def test_several_splits_are_refused(folder):
    import datasets

    datasets.DatasetDict({"train": table(folder), "test": table(folder)}).save_to_disk(folder / "both")
    with pytest.raises(UserError, match="several splits, train, test: name the folder of one"):
        read_conversations(folder / "both")
    assert len(read_conversations(folder / "both" / "train").rows) == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.json", b'[{"a": 1},\n {oops}]', "x.json is not JSON: Expecting property name enclosed in double quotes at line 2, column 3"),
        ("x.json", b"", "line 1, column 1"),
        ("x.json", b'{"question": "q"}\n{"question": "q"}', "line 2, column 1. It looks like JSON lines: name it .jsonl"),
        ("x.json", b'{"question": "q"}', "must hold a list of rows"),
        ("x.json", b'["\xff"]', "x.json is not text in UTF-8: byte 2"),
        ("x.json", b"[]", "none of its 0 rows"),
        ("x.jsonl", b'{"question": "q", "answer": "a"}\n\n{"a" 1}\n', "x.jsonl is not JSON: Expecting ':' delimiter at line 3, column 6"),
        ("x.jsonl", b'{"question": "q", "answer": "\xff"}\n', "x.jsonl is not text in UTF-8"),
        ("x.parquet", b"not a table", "x.parquet is not a data set"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(folder, name, text, words):
    (folder / name).write_bytes(text)
    with pytest.raises(UserError) as error:
        read_conversations(folder / name)
    assert words in str(error.value)


def test_files_and_folders_that_are_not_there(folder):
    there = folder / "x.json"
    there.write_text("[]")
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        read_conversations(folder / "nowhere.json")
    with pytest.raises(UserError, match=r"--images .*nowhere is not a folder"):
        read_conversations(there, folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="is not a data set: it holds none of"):
        read_conversations(folder / "empty")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "a.png", "conversations": human("<image><image>")}, "2 marks <image> for 1 images"),
        ({"images": ["a.png", "b.png"], "conversations": human("<image>Why?")}, "1 marks <image> for 2 images"),
        ({"conversations": human("<image>Why?")}, "1 marks <image> for 0 images"),
        ({"image": "z.png", **PLAIN}, "there is no image"),
        ({"image": "https://localhost/a.png", **PLAIN}, "is on the network: fetch it first"),
        ({"image": "", **PLAIN}, "an image cannot be ''"),
        ({"image": "a" * 300, **PLAIN}, "there is no image"),
        ({"messages": [{"role": "robot", "content": "Why?"}]}, "the role 'robot' is unknown; known are human, user"),
        ({"messages": [{"content": "Why?"}]}, "the role 'None' is unknown"),
        ({"messages": [{"role": ["user"], "content": "Why?"}]}, "the role "),
        ({"messages": user("Why?")[:1] * 2}, "message 2 is the user's where the assistant's should be"),
        ({"messages": user("Why?")[::-1]}, "message 1 is the assistant's where the user's should be"),
        ({"conversations": human("Why?", " \n")}, "an answer is empty"),
        ({"messages": [*user("Why?")[:1], {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "an answer is empty"),
        ({"image": "a.png", "conversations": human("Why?", "<image>")}, "an answer holds an image"),
        ({"messages": user("Why?") + user("How?")[:1]}, "the last question has no answer"),
        ({"conversations": human(" ")}, "a question is empty"),
        ({"messages": user([{"type": "text", "text": " "}])}, "a question is empty"),
        ({"conversations": human(None)}, "must be text or a list of blocks, not None"),
        ({"messages": user([{"type": "video", "video": "a.mp4"}])}, "there is no video"),
        ({"messages": user([["Why?"]])}, "block"),
        ({"messages": user(block(image="a.png")), "images": ["a.png"]}, "keep one of the two"),
        ({"messages": user([*block(image="a.png"), {"type": "image"}])}, "2 marks <image> for 1 images"),
        ({"messages": user(block(image="a.png")) + user("<image>?")}, "2 marks <image> for 1 images"),
        ({"question": "Why?"}, "a question and no answer"),
        ({"question": "Why?", "answer": None}, "a question and no answer"),
        ({"question": "Why?", "answers": []}, "no answer"),
        ({"text": "Why?"}, "none of the fields conversations, messages or question"),
        ({"messages": []}, "the row has no messages"),
        ({"messages": [], "images": ["a.png"]}, "the row has no messages"),
        ({"messages": [{"role": "system", "content": "Be kind."}], "images": ["a.png"]}, "the row has no messages"),
        ({"messages": "Why?"}, "messages"),
        ({"conversations": ["Why?", "So."]}, "message"),
        ("Why?", "must be an object, not str"),
        ([PLAIN], "must be an object, not list"),
        (None, "must be an object"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_or_left_out(folder, row, words):
    with pytest.raises(UserError) as error:
        read(folder, PLAIN, row)
    assert str(error.value).startswith("data.json, row 2: ")
    assert words in str(error.value)
    assert str(error.value).endswith("(--skip-bad leaves such rows out.)")
    kept = read(folder, PLAIN, row, PLAIN, skip_bad=True)
    assert [one.location for one in kept.rows] == ["data.json, row 1", "data.json, row 3"]
    assert len(kept.faults) == 1
    assert kept.faults[0].startswith("data.json, row 2: ")
    assert words in kept.faults[0]


def test_images_are_looked_for_beside_the_file(folder):
    (folder / "x.jsonl").write_text(json.dumps({"image": "b.png", **PLAIN}))
    assert [image_names(row) for row in read_conversations(folder / "x.jsonl").rows] == ["b"]


def test_a_folder_that_nobody_named_is_not_blamed(folder):
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        read_conversations(folder / "nowhere" / "x.json")


def test_no_row_is_left(folder):
    with pytest.raises(
        UserError, match=r"none of its 2 rows can be used\. data\.json, row 1: the row must be an object"
    ):
        read(folder, 1, 2, skip_bad=True)


def test_until_takes_the_images_of_its_messages(folder):
    [row] = read(folder, {"images": ["a.png", "b.png"], "messages": user("<image>?") + user("<image>!")}).rows
    assert [image_names(row.until(count)) for count in range(5)] == ["", "a", "a", "ab", "ab"]
    assert messages_as_text(row.until(2)) == ["user: <image>?", "assistant: So."]
    assert row.until(4) == row
