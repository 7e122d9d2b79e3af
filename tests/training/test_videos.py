"""Videos in rows: read from files and frames, the frames that each base is given, learned, measured, asked about and exported."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import train_until
from tiny_vlms import build
from transformers import AutoProcessor

from rankfold.apps.cli import main
from rankfold.apps.cli.demo_instruct import print_figures
from rankfold.pipelines.chat import load_media, open_chat, whole_answers
from rankfold.pipelines.export_chat import export_chat, noise_media
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.conversations import Conversation, parse_conversation, read_conversations
from rankfold.toolkit.data.image_checks import check_image
from rankfold.toolkit.data.videos import Clip, Video, VideoFacts, load_clip, parse_video
from rankfold.toolkit.embedded import moves
from rankfold.toolkit.embedded.tiny_vlm import save_video_model
from rankfold.toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.embedded.demo_instruct import evaluate_demo, train_demo, write_demo_data
from rankfold.training.evaluation.instruct import choose_frames, evaluate
from rankfold.training.evaluation.items import read_items, shuffle_frames
from rankfold.training.instruct.conversations import plan_rows
from rankfold.training.instruct.loss import AnswerLoss
from rankfold.training.launch.start import resume, train

FAMILIES = ("llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5-vl", "smolvlm", "internvl", "gemma4")
SIZE = (56, 40)
ONE = {"weight": torch.ones(())}


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """Six noise frames, a.mp4 of a bright bar that moves (20 frames, 10 a second), and a plain image."""
    folder = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(folder / f"{number}.png")
    write_film(folder / "a.mp4", 20)
    return folder


def write_film(path, count):
    """A film whose frame n has a bright bar at column 2n."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(count):
            pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
            pixels[:, 2 * number : 2 * number + 6] = 255
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        film.mux(stream.encode())


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("bases"), {}

    def folder(name):
        if name not in made:
            made[name] = build(name, root / name)
        return made[name]

    return folder


@pytest.fixture(params=FAMILIES)
def base(request, bases):
    return bases(request.param)


def rows_of(base):
    """A list of frames, a film, two turns with two videos and (where the processor keeps it) an image beside, an image, words alone."""
    beside = {"images": ["0.png"]} if "smolvlm" not in str(base) else {}
    marks = "<image>\n<video> this is what <video>" if beside else "<video> this is what <video>"
    second = "a.mp4" if "qwen" in str(base) else ["3.png", "4.png", "5.png"]  # elsewhere as many frames as the first
    turns = [{"role": "user", "content": marks}, {"role": "assistant", "content": "blue"}]
    turns += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "green it is"}]
    return [
        {"video": [f"{number}.png" for number in range(4)], "question": "<video>what is it", "answer": "red square"},
        {"video": "a.mp4", "question": "what", "answer": "a bar"},
        {"messages": turns, "videos": [["0.png", "1.png", "2.png"], second], "fps": 2, **beside},
        {"image": "1.png", "question": "what", "answer": "a circle"},
        {"question": "hello", "answer": "hi"},
    ]


def prepared(vision, frames):
    """Rows with their frames chosen, and their images and clips."""
    rows = [parse_conversation(row, frames, f"row {n}") for n, row in enumerate(rows_of(vision.folder), 1)]
    checked = {medium: check_image(medium) for row in rows for medium in row.images}
    rows = [vision.chat.choose_frames(row, checked) for row in rows]
    return rows, [load_media(vision, row) for row in rows]


def a_config(base, frames, tmp_path, **more):
    (tmp_path / "data.json").write_text(json.dumps(rows_of(base)))
    settings = {
        "steps": 2,
        "batch_size": 2,
        "rank": 4,
        "alpha": 4.0,
        "learning_rate": 0.02,
        "workers": 0,
        "threads": 1,
        "preview_every": 0,
    }
    return InstructConfig(
        base=str(base), data=tmp_path / "data.json", images=frames, out=tmp_path / "run", **(settings | more)
    )


def test_labels_and_losses(base, frames):
    """Labels are found in two ways; a batch is its rows, also packed; the loss is the model's own."""
    vision = VisionLanguageModel(str(base))
    rows, media = prepared(vision, frames)
    for row, own in zip(rows, media, strict=True):
        vision.chat.verify_labels(row, own)
    plain, packed = AnswerLoss(vision.model).eval(), AnswerLoss(vision.model, packing=True).eval()
    batch = vision.chat.collate(rows, media)
    with torch.no_grad():
        together, ends = plain(batch | ONE), packed(dict(batch) | ONE)
        alone = torch.cat(
            [plain(vision.chat.collate([row], [own]) | ONE) for row, own in zip(rows, media, strict=True)]
        )
        single = vision.chat.collate(rows[:1], media[:1])
        theirs = vision.model(**single).loss * (single["labels"] >= 0).sum()
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    if vision.family.supports_packing:
        torch.testing.assert_close(ends, alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone[0], theirs, rtol=1e-4, atol=1e-4)


def test_the_same_as_the_processors_own_chat(base, frames):
    """Tensors of a question about frames, and of one about a file by the base's own rule, are those of apply_chat_template."""
    vision = VisionLanguageModel(str(base))
    rows, media = prepared(vision, frames)
    for row, own in zip(rows[:2], media[:2], strict=True):
        clip = own[0]
        ours = vision.chat.collate_questions([row.until(1)], [own])
        content = [
            {"type": "video", "video": clip.array()},
            {"type": "text", "text": row.messages[0]["content"][-1]["text"]},
        ]
        about = {"total_num_frames": clip.size.total, "fps": clip.size.fps, "frames_indices": list(clip.size.chosen)}
        about["duration"] = clip.size.total / clip.size.fps
        theirs = vision.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": [about]},
        )  # fmt: skip
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, torch.as_tensor(theirs[key]), rtol=0, atol=0)
        with torch.no_grad():
            logits = vision.model(**theirs).logits
            torch.testing.assert_close(vision.model(**ours).logits, logits, rtol=0, atol=0)


def test_a_video_is_seen(base, frames):
    """Frames in another order are another question."""
    vision = VisionLanguageModel(str(base))
    rows, media = prepared(vision, frames)
    row, clip = rows[0], media[0][0]
    turned = Clip(clip.frames[::-1], clip.size)
    with torch.no_grad():
        one, other = (
            vision.model(**vision.chat.collate_questions([row.until(1)], [[shown]])).logits[0, -1]
            for shown in (clip, turned)
        )
    assert (one - other).abs().max() > 1e-5


def test_trains_resumes_answers_and_is_exported(base, frames, tmp_path):
    config = a_config(base, frames, tmp_path, steps=4, checkpoint_every=2, video_frames=4)
    whole, part = train(config), train_until(replace(config, out=tmp_path / "b"), 2)
    resume(part.folder)
    files = [run.adapter / "model" / "adapter_model.safetensors" for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    vision = open_chat(str(base), [whole.adapter])
    assert vision.chat.videos.limit == 4
    assert len(whole_answers(vision, [read_conversations(config.data, frames).rows[1].until(1)], max_new_tokens=3)) == 1
    assert isinstance(noise_media(vision)[-1], Clip)
    for format in ("peft", "merged", "vllm"):
        proof = export_chat(whole.adapter, str(base), format, tmp_path / "export")
        assert proof.difference < 1e-5
        assert proof.effect > 1e-4
        exported = AutoProcessor.from_pretrained(proof.path).video_processor
        assert exported.to_dict() == vision.processor.video_processor.to_dict()


def test_frames_are_chosen_by_the_bases_rule(bases, frames):
    """Of 20 frames in 2 seconds Qwen takes two a second (four at least), SmolVLM one a second, Gemma 4 all (of up to 32), others eight.

    A limit takes fewer, evenly.
    """
    counts = {}
    for name in FAMILIES:
        for limit in (None, 3):
            vision = VisionLanguageModel(str(bases(name)), video_frames=limit)
            row = parse_conversation({"video": "a.mp4", "question": "what", "answer": "x"}, frames, "row 1")
            chosen = vision.chat.choose_frames(row, {row.images[0]: check_image(row.images[0])}).images[0].size.chosen
            assert list(chosen) == sorted(set(chosen))
            counts[name, limit] = len(chosen)
    assert [counts[name, None] for name in FAMILIES] == [8, 4, 4, 4, 4, 2, 8, 20]
    assert [counts[name, 3] for name in FAMILIES] == [3, 3, 3, 3, 3, 2, 3, 3]


def test_short_videos_repeat_frames_where_all_must_be_as_long(bases, frames):
    vision = VisionLanguageModel(str(bases("llava-onevision")), video_frames=6)
    row = parse_conversation({"video": ["0.png", "1.png"], "question": "what", "answer": "x"}, frames, "row 1")
    chosen = vision.chat.choose_frames(row, {row.images[0]: check_image(row.images[0])}).images[0].size.chosen
    assert chosen == (0, 0, 0, 1, 1, 1)


def test_films_are_read_frame_by_frame(frames):
    """The chosen frames are those of the file: the bar stands where it was drawn."""
    video = parse_video("a.mp4", frames)
    found = check_image(video)
    assert (found.size, found.frames, found.fps) == (SIZE, 20, 10.0)
    clip = load_clip(video)
    for number in (0, 7, 19):
        columns = np.asarray(clip.frames[number].convert("L")).mean(0)
        assert abs(int(columns.argmax()) - (2 * number + 3)) <= 4


def test_forms_of_rows(frames):
    """One video or several, as files, lists and folders, beside the texts or within them."""
    llava, words = (
        [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "x"}],
        {"type": "text", "text": "what"},
    )
    films = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, words]}
    answer = {"role": "assistant", "content": "x"}
    listed = {"type": "video", "video": ["0.png", "1.png"], "fps": 5.0}
    for row, wanted in (
        ({"video": "a.mp4", "conversations": llava}, [frames / "a.mp4"]),
        ({"videos": ["a.mp4", "a.mp4"], "question": "Q", "answer": "x"}, [frames / "a.mp4"] * 2),
        ({"videos": ["0.png", "1.png"], "question": "Q", "answer": "x"}, [(frames / "0.png", frames / "1.png")]),
        ({"videos": [["0.png"], ["1.png"]], "question": "Q", "answer": "x"}, [(frames / "0.png",), (frames / "1.png",)]),
        ({"frames": ["0.png", "1.png"], "question": "Q", "answer": "x"}, [(frames / "0.png", frames / "1.png")]),
        ({"video": ".", "question": "Q", "answer": "x"}, [tuple(frames / f"{n}.png" for n in range(6))]),
        ({"messages": [films, answer]}, [frames / "a.mp4"]),
        ({"messages": [{"role": "user", "content": [listed, words]}, answer]}, [(frames / "0.png", frames / "1.png")]),
    ):  # fmt: skip
        read = parse_conversation(row, frames, "row 1")
        assert [medium.source for medium in read.images] == wanted
        parts = [part["type"] for part in read.messages[0]["content"]]
        assert parts == ["video"] * len(wanted) + ["text"]
    assert read.images[0].fps == 5.0
    mixed = {"images": ["0.png"], "video": "a.mp4", "question": "<video> then <image>", "answer": "x"}
    assert [isinstance(medium, Video) for medium in parse_conversation(mixed, frames, "row 1").images] == [True, False]


def refused(row, frames, match):
    with pytest.raises(UserError, match=match):
        parse_conversation({"question": "<video>Q", "answer": "x"} | row, frames, "row 1")


def test_what_cannot_be_used_is_refused(bases, frames, tmp_path):
    refused({"video": "none.mp4"}, frames, "there is no video")
    refused({"video": "https://example.org/a.mp4"}, frames, "on the network")
    refused({"video": "a.mp4", "videos": ["a.mp4"]}, frames, "all name videos")
    refused({}, frames, "1 marks <video> for 0 videos")
    refused({"video": ["0.png"], "fps": 0}, frames, "frames per second")
    refused({"clip": "a.mp4", "question": "Q"}, frames, "--columns video=clip")
    refused({"audio": "a.wav", "question": "Q"}, frames, "audio")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    sizes = Video((frames / "0.png", tmp_path / "small.png"))
    assert "several sizes" in check_image(sizes).fault
    (tmp_path / "cut.mp4").write_bytes((frames / "a.mp4").read_bytes()[:300])
    assert "not a video" in check_image(Video(tmp_path / "cut.mp4")).fault
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"video": ["0.png", "1.png"], "question": "Q", "answer": "x"}]))
    for name, match in (("llava", "takes no video"), ("glm4v", "takes no video"), ("qwen2-vl", "pad-to-square")):
        chat = VisionLanguageModel(str(bases(name)), pad_to_square=True).chat
        with pytest.raises(UserError, match=match):
            plan_rows(data, InstructConfig(data=data, images=frames), chat)
    beside = {"images": ["0.png"], "video": "a.mp4", "question": "Q", "answer": "x"}
    data.write_text(json.dumps([beside]))
    with pytest.raises(UserError, match="loses the image"):
        plan_rows(data, InstructConfig(data=data, images=frames), VisionLanguageModel(str(bases("smolvlm"))).chat)
    data.write_text(json.dumps([{"videos": [["0.png"], ["1.png", "2.png"]], "question": "Q", "answer": "x"}]))
    with pytest.raises(UserError, match=r"1 and 2 frames.*--video-frames 1"):
        plan_rows(data, InstructConfig(data=data, images=frames), VisionLanguageModel(str(bases("internvl"))).chat)


def test_a_row_says_what_is_assumed(bases, frames, tmp_path, capsys):
    """`inspect` counts videos and frames, and names the frames per second that nobody gave and the limit that does not hold."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows_of("")[:2]))
    main(
        [
            "inspect",
            str(data),
            "--images",
            str(frames),
            "--base",
            str(bases("qwen2-vl")),
            "--max-pixels",
            "3000",
            "--video-frames",
            "3",
        ]
    )
    said = capsys.readouterr().out
    assert "0 images and 2 videos (3 to 3 frames seen of each, median 3)" in said
    assert "1 videos are frames without frames per second" in said
    assert "--max-pixels and --min-pixels are of images" in said


def test_chat_and_evaluation_take_videos(bases, frames, tmp_path, capsys):
    """By the command; controls show grey frames, and other rows' videos."""
    base = str(bases("qwen2-vl"))
    (tmp_path / "film").mkdir()
    for number in range(3):
        (tmp_path / "film" / f"{number}.png").write_bytes((frames / f"{number}.png").read_bytes())
    main(["chat", "--base", base, "--video", str(tmp_path / "film"), "--max-new-tokens", "3", "what is it"])
    assert capsys.readouterr().out.strip()
    data = tmp_path / "test.json"
    rows = [
        {"video": film, "question": "what", "answer": answer}
        for film, answer in (("a.mp4", "bar"), (["0.png", "1.png"], "noise"))
    ]
    data.write_text(json.dumps(rows))
    figures = evaluate(open_chat(base), read_items(data, frames), likelihood=False, max_new_tokens=3)
    assert set(figures["controls"]) == {
        "commonest answer",
        "blank image",
        "another row's image",
        "frames in another order",
    }


def test_frames_in_another_order(bases, frames, tmp_path):
    """The same frames at the same times, none where it was; an image beside stays."""
    vision = VisionLanguageModel(str(bases("qwen2-vl")))
    data = tmp_path / "test.json"
    rows = [
        {"video": video, "question": "what", "answer": "bar"} for video in ("a.mp4", [f"{n}.png" for n in range(4)])
    ]
    rows += [{"image": "0.png", "question": "what", "answer": "noise"}]
    data.write_text(json.dumps(rows))
    items = choose_frames(vision, read_items(data, frames))
    mixed = [item.conversation.images[0] for item in shuffle_frames(items, 0)]
    for item, other in zip(items[:2], mixed[:2], strict=True):
        before, after = load_clip(item.conversation.images[0]), load_clip(other)
        assert before.size == after.size
        pixels = [[np.asarray(frame).tobytes() for frame in clip.frames] for clip in (before, after)]
        assert sorted(pixels[0]) == sorted(pixels[1])
        assert pixels[0] != pixels[1]
    assert mixed[2] == items[2].conversation.images[0]


def test_the_embedded_model_for_videos(tmp_path):
    """Its words are the embedded model's own, to the bit, and a film is seen in the order of its frames."""
    save_video_model(Path(resolve_vision_base("tiny-vlm")), tmp_path / "base")
    images, films = (VisionLanguageModel(base) for base in (resolve_vision_base("tiny-vlm"), str(tmp_path / "base")))
    said = Conversation(({"role": "user", "content": [{"type": "text", "text": "What colour?"}]},), (), "row 1")
    with torch.no_grad():
        logits = [one.model(**one.chat.collate_questions([said], [[]])).logits[..., :511] for one in (images, films)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    drawn = moves.draw_moves(3, "snow", "left", np.random.default_rng(0))
    assert len(drawn) == moves.FRAMES
    assert films.chat.videos.choose(VideoFacts(64, 64, moves.FRAMES, 2.0), whole=True).chosen == tuple(
        range(moves.FRAMES)
    )


def test_the_demo_on_videos(tmp_path, capsys):
    """A step of it: the control of order stands beside the others, and no old questions are asked."""
    files = write_demo_data(tmp_path / "data", task="moves", rows=6, test=6)
    run = train_demo(files, tmp_path / "alone", task="moves", replay=False, steps=1, threads=1)
    print_figures({"alone": evaluate_demo(run, files)})
    said = capsys.readouterr().out
    assert "with its frames in another order" in said
    assert "old questions" not in said
