"""Fields of rows: used, counted, or refused with what to do; and the file forms that other tools write."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.conversations import parse_conversation, read_conversations
from rankfold.toolkit.data.image_checks import PlanMemory, check_images
from rankfold.toolkit.data.row_fields import UnusedFields


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images."""
    made = tmp_path_factory.mktemp("rows")
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 24), colour).save(made / name)
    return made


def user(text):
    return {"role": "user", "content": text}


def said(text, **flags):
    return {"role": "assistant", "content": text, **flags}


PAIR = {"question": "Q", "answer": "A"}


def told(row):
    """Messages as (first letter of the role, text)."""
    return [(m["role"][0], "".join(part.get("text", "[I]") for part in m["content"])) for m in row.messages]


@pytest.mark.parametrize(
    ("row", "messages", "images"),
    [
        ({"image_path": "a.png", **PAIR}, [("u", "[I]Q"), ("a", "A")], 1),
        ({"file_name": "a.png", **PAIR}, [("u", "[I]Q"), ("a", "A")], 1),
        ({"image_1": "a.png", "image_2": "b.png", "question": "<image 2> or <image 1>?", "answer": "A"},
         [("u", "[I] or [I]?"), ("a", "A")], 2),
        ({"system": "S", **PAIR}, [("s", "S"), ("u", "Q"), ("a", "A")], 0),
        ({"instruction": "Do", "input": "this", "output": "ok", "history": [["a", "b"]]},
         [("u", "a"), ("a", "b"), ("u", "Do\nthis"), ("a", "ok")], 0),
        ({"query": "<image>Q", "response": "R", "images": ["a.png"]}, [("u", "[I]Q"), ("a", "R")], 1),
        ({"prompt": [user("Q")], "completion": [said("R")], "images": ["a.png"]}, [("u", "[I]Q"), ("a", "R")], 1),
        ({"prompt": [user("Q")], "answer": "R"}, [("u", "Q"), ("a", "R")], 0),
        ({"texts": [{"user": "q", "assistant": "a"}], "images": ["a.png"]}, [("u", "[I]q"), ("a", "a")], 1),
        ({"messages": [{**user("q"), "images": ["a.png"]}, said("x")]}, [("u", "[I]q"), ("a", "x")], 1),
        ({"messages": [user("q"), said("x", reasoning_content="hm")]}, [("u", "q"), ("a", "<think>\nhm\n</think>\n\nx")], 0),
        ({"question": "Q", "answers": [{"answer": "cat"}, {"answer": "dog"}, {"answer": "dog"}]}, [("u", "Q"), ("a", "dog")], 0),
        ({"image": "a.png", "objects": {"ref": ["cat"], "bbox": [[3, 4, 20, 21]]}, 
          "messages": [user("<image>Find <ref-object>!"), said("at <bbox>.")]},
         [("u", "[I]Find cat!"), ("a", "at [3, 4, 20, 21].")], 1),
        ({"messages": [user("  x\n y "), said("    def f():\n        pass\n")]},
         [("u", "  x\n y "), ("a", "    def f():\n        pass\n")], 0),
        ({"Image": "a.png", "Question": "Q", "Answer": "A", "System Prompt": "S"}, [("s", "S"), ("u", "[I]Q"), ("a", "A")], 1),
        ({"image": "a.png", "image_2": "b.png", **PAIR}, [("u", "[I][I]Q"), ("a", "A")], 2),
        ({"images": '["a.png", "b.png"]', "messages": '[{"role": "User", "content": "Q"}, {"role": "Assistant", "content": "A"}]'},
         [("u", "[I][I]Q"), ("a", "A")], 2),
        ({"images": {"path": ["a.png", "b.png"], "bytes": [None, None]},
          "messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}},
         [("u", "[I][I]Q"), ("a", "A")], 2),
        ({"image": "a.png", "question": "Q", "A": "x", "B": "y", "answer": "B"},
         [("u", "[I]Q\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."), ("a", "B")], 1),
        ({"image": "a.png", "messages": [user(["<image>\r\nQ\r\n"]), said({"type": "text", "content": "A"})]},
         [("u", "[I]Q\r\n"), ("a", "A")], 1),
        ({"messages": [user("Picture 1: <img>a.png</img>\nQ"), said("A")]}, [("u", "Picture 1: [I]\nQ"), ("a", "A")], 1),
        ({"images": ["a.png", "b.png"], "question": "<ImageHere> or <ImageHere>?", "answer": "A"}, [("u", "[I] or [I]?"), ("a", "A")], 2),
        ({"question": "What does <Image> do in JSX?", "answer": "<Image>"}, [("u", "What does <Image> do in JSX?"), ("a", "<Image>")], 0),
        ({"question": "Q", "answer": '{"total": 5}'}, [("u", "Q"), ("a", '{"total": 5}')], 0),
    ],
)  # fmt: skip
def test_fields_are_used(folder, row, messages, images):
    got = parse_conversation(row, folder, "row 1")
    assert (told(got), len(got.images)) == (messages, images)


@pytest.mark.parametrize("answer", ["y", "B", "b", 1, "1"])
def test_choices_are_asked_with_their_letters(folder, answer):
    """A number is an index from 0."""
    got = parse_conversation({"question": "Q", "choices": ["x", "y"], "answer": answer}, folder, "row 1")
    assert told(got)[1] == ("a", "B")
    assert "A. x\nB. y\n" in told(got)[0][1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"photo_file": "a.png", **PAIR}, "--columns image=photo_file"),
        ({"pix": {"bytes": b"\x89PNG..."}, **PAIR}, "--columns image=pix"),
        ({"videos": ["a.mp4"], **PAIR}, "there is no video"),
        ({"media": "a.mp4", **PAIR}, "'media' holds video"),
        ({"sound": {"path": "a.wav"}, **PAIR}, "'sound' holds audio"),
        ({"messages": [user("<video>What?"), said("x")]}, "1 marks <video> for 0 videos"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "TRL's DPOTrainer"),
        ({"messages": [user("Q"), said("A")], "rejected_response": "B"}, "TRL's DPOTrainer"),
        ({"prompt": "Q", "completion": "A", "label": True}, "TRL's DPOTrainer"),
        ({"messages": [user("Q"), said("A")], "tools": [{"name": "f"}]}, "holds tools"),
        ({"messages": [user("Q"), said("A", tool_calls=[{"id": 1}])]}, "calls of tools"),
        ({"messages": [user("Q"), said("A")], "question": "Q"}, "--columns ignore=question"),
        ({"image": "a.png", "question": "find", "answer": "<box>"}, "'objects' has nothing left for it"),
        ({"image": "a.png", "objects": {"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "question": "?", "answer": "<bbox>"},
         "2 of 'bbox' for 1 marks"),
        ({"image": "a.png", "objects": {"bbox": [[9, 9, 3, 4]]}, "question": "find", "answer": "<bbox>"}, "not x, y, width, height"),
        ({"messages": [user("Q"), said("A", weight="high")]}, "'weight' must be"),
        ({"messages": [user("Q"), said("A", train=False)]}, "nothing of the row is learned"),
        ({"messages": [user("Q"), said("A", train=False, weight=1)]}, "contradict"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, user("Q"), said("A")]}, "two system prompts"),
        ({"images": ["a.png"], "question": "<image 2>?", "answer": "A"}, "each must be named once"),
        ({"messages": [user("Q"), said("A", masked=True)]}, "call it 'loss'"),
        ({"loss_weight": 0.1, **PAIR}, "give each turn a 'weight'"),
        ({"sys": "Be short", **PAIR}, "--columns system=sys"),
        ({"image": "a.png", "image1": "b.png", **PAIR}, "--columns ignore=image1"),
        ({"image": "a.png", "depth": {"bytes": b"\x89PNG..."}, **PAIR}, "beside those that are read"),
        ({"Question": "P", **PAIR}, "gives 'question' twice"),
        ({"question": "Q", "answer": [1, 2, 3, 4]}, "a list of numbers"),
        ({"question": "Q", "answer": True}, "must be a text, not true"),
        ({"instruction": "Q", "output": {"x": 1}}, "must be a text, not of type dict"),
        ({"messages": [user([{"type": "text"}]), said("A")]}, "has no 'text'"),
        ({"image": "a.png", "question": "<ImageHere> or <ImageHere>?", "answer": "A"}, "there are 2 for 1 images"),
        ({"video": ["a.png", "b.png"], "start_time": 1.5, **PAIR}, "cut it before, or --columns ignore=start_time"),
        ({"messages": [user([{"type": "video", "video": ["a.png"], "video_start": 1}]), said("A")]}, "cut it before"),
        ({"question": "Q", "choices": ["2", "1", "0"], "answer": 0}, "the text of option C, and the index (from 0) of A"),
    ],
)  # fmt: skip
def test_fields_that_change_the_meaning_are_refused(folder, row, words):
    with pytest.raises(UserError) as error:
        parse_conversation(row, folder, "row 1")
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_other_fields_are_counted_once(folder):
    (folder / "extra.json").write_text(
        json.dumps([{**PAIR, "hint": "h", "id": 3}, {**PAIR, "hint": "h", "note": "n"}, {**PAIR, "hint": ""}])
    )
    unused = read_conversations(folder / "extra.json").unused
    assert unused.describe() == "Not used: field 'hint' (2 rows), field 'note' (1 row)."
    assert UnusedFields().describe() == ""


@pytest.mark.parametrize(
    ("flags", "learn", "weights"),
    [
        (({}, {}), "all", ()),
        (({"loss": False}, {}), "all", (0, 0, 0, 1)),
        (({"weight": 0.5}, {"weight": 1}), "all", (0, 0.5, 0, 1)),
        (({}, {}), "last", (0, 0, 0, 1)),
        (({"train": True}, {}), "marked", (0, 1, 0, 0)),
    ],
)
def test_turns_count_by_their_flags(folder, flags, learn, weights):
    first, second = flags
    row = {"messages": [user("Q"), said("A", **first), user("Q"), said("B", **second)]}
    assert parse_conversation(row, folder, "row 1", learn=learn).weights == weights


def write_table(file, rows, delimiter=","):
    with file.open("w", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def test_tables_shards_and_folders_of_images(folder, tmp_path):
    """CSV, a folder of images with its table, a clone of the hub with two splits, other columns."""
    import datasets

    write_table(tmp_path / "x.csv", [{"Bild": str(folder / "a.png"), "Frage": "Q, or?", "Antwort": "A\nB"}], ";")
    columns = ("image=Bild", "question=Frage", "answer=Antwort")
    [row] = read_conversations(tmp_path / "x.csv", columns=columns).rows
    assert told(row) == [("u", "[I]Q, or?"), ("a", "A\nB")]
    with pytest.raises(UserError, match=r"no row of .* has a field 'Wort'"):
        read_conversations(tmp_path / "x.csv", columns=(*columns, "ignore=Wort"))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(folder / "a.png").save(photos / "a.png")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **PAIR}))
    [row] = read_conversations(photos).rows
    assert row.images == (photos / "a.png",)
    clone = tmp_path / "clone" / "data"
    clone.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        datasets.Dataset.from_list([PAIR]).to_parquet(clone / f"{name}.parquet")
    with pytest.raises(UserError, match="several splits, test, train: choose one with --split"):
        read_conversations(clone.parent)
    assert len(read_conversations(clone.parent, split="train").rows) == 2
    assert len(read_conversations(clone / "train-*.parquet").rows) == 2


def test_base64_in_any_form(folder):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "png")
    for value in (
        base64.b64encode(buffer.getvalue()).decode(),
        "data:image/png;base64," + base64.encodebytes(buffer.getvalue()).decode(),
    ):
        assert parse_conversation({"image": value, **PAIR}, folder, "row 1").images == (buffer.getvalue(),)
    with pytest.raises(UserError) as error:
        parse_conversation({"image": "x" * 5000, **PAIR}, folder, "row 1")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000, '{"question": "q", "answer": "a"}\n' + "[" * 100_000])
def test_files_that_json_itself_cannot_read(tmp_path, text):
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"x\.json"):
            read_conversations(tmp_path / name)


def test_images_are_checked_once_and_remembered(folder, tmp_path, monkeypatch):
    whole = (folder / "a.png").read_bytes()
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(noise, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(noise.getvalue()[:900])
    sources = [whole, folder / "b.png", tmp_path / "cut.jpg"]
    memory = PlanMemory(tmp_path / "data.json")
    first = check_images(sources, memory)
    memory.save()
    assert [first[source].size for source in sources] == [(32, 24), (32, 24), (64, 64)]
    assert [bool(first[source].fault) for source in sources] == [False, False, True]
    monkeypatch.setattr("rankfold.toolkit.data.image_checks.check_image", None)  # nothing is opened again
    assert check_images(sources, PlanMemory(tmp_path / "data.json")) == first


def test_images_beyond_the_memory_lie_on_disk(folder, tmp_path, monkeypatch):
    """The rows are the same, whatever stays in memory; the same image is written once, and a video's frames are images too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rankfold.toolkit.data import image_store
    from rankfold.toolkit.data.videos import Video, medium_bytes
    from rankfold.training.evaluation.items import read_items

    raw = [(folder / name).read_bytes() for name in ("a.png", "b.png", "a.png")]
    pq.write_table(pa.table({"image": raw, "question": ["Q"] * 3, "answer": ["A"] * 3}), tmp_path / "x.parquet")
    plain = read_conversations(tmp_path / "x.parquet").rows
    assert [row.images for row in plain] == [(one,) for one in raw]
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_store, "IN_MEMORY", len(raw[0]))
    kept = read_conversations(tmp_path / "x.parquet").rows
    assert kept[0].images == (raw[0],)
    assert [medium_bytes(row.images[0]) for row in kept] == raw
    assert len([path for path in (tmp_path / "cache" / "images").rglob("*") if path.is_file()]) == 2
    assert check_images([row.images[0] for row in kept], PlanMemory(tmp_path / "x.parquet"))[
        kept[2].images[0]
    ].size == (32, 24)
    questions = read_items(tmp_path / "x.parquet", None)
    assert [isinstance(item.conversation.images[0], bytes) for item in questions] == [True, False, False]
    assert questions[0].cluster == questions[2].cluster != questions[1].cluster
    film = image_store.ImageStore(0).keep(Video((raw[0], raw[1]), 2.0))
    assert medium_bytes(film) == raw[0] + raw[1]
    assert not any(isinstance(frame, bytes) for frame in film.source)


def test_frames_and_pages_that_nobody_sees_are_named(folder, tmp_path):
    """Of an animation and a scan of two pages the first image is seen, and it is said."""
    from rankfold.toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
    from rankfold.training.config.instruct import InstructConfig
    from rankfold.training.instruct.conversations import plan_rows

    two = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    for name in ("film.gif", "scan.tiff", "one.gif"):
        two[0].save(tmp_path / name, save_all=True, append_images=two[1:] if name != "one.gif" else [])
    rows = [{"image": name, **PAIR} for name in ("film.gif", "scan.tiff", "one.gif")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = InstructConfig(data=tmp_path / "data.json")
    chat = VisionLanguageModel(resolve_vision_base("tiny-vlm")).chat
    for _ in range(2):  # the second time as it is remembered
        (note,) = plan_rows(tmp_path / "data.json", config, chat).notes
        assert "film.gif" in note
        assert "scan.tiff" in note
        assert "one.gif" not in note
