"""Compose, Chat and Library of the studio: their handlers as functions, on adapters that were really trained."""

import json
import weakref
import zipfile
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from settings import quick_config

from rankfold.apps.studio.backend.context import Studio
from rankfold.apps.studio.backend.paths import StudioPaths
from rankfold.apps.studio.backend.pipeline_worker import Job, JobStopped, ModelCache, PipelineWorker
from rankfold.apps.studio.backend.recipes import base_numbers, build_recipe, drawing_numbers, recalled_adapters
from rankfold.apps.studio.backend.start_images import keep_start, kept_start
from rankfold.apps.studio.pages import chat as chat_page
from rankfold.apps.studio.pages import compare as compare_page
from rankfold.apps.studio.pages import compose as compose_page
from rankfold.apps.studio.pages import generate as generate_page
from rankfold.apps.studio.pages import library as library_page
from rankfold.apps.studio.pages import train as train_page
from rankfold.apps.studio.pages.chat import ChatModels, ChatModelSpec, ChatState, PartialAnswers
from rankfold.apps.studio.widgets.compose_preview import ComposePreview
from rankfold.pipelines.chat import answers, open_chat
from rankfold.pipelines.generate import Recipe, denoise, load_pipeline
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats.locate import adapter_path, content_hash
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.config.yaml_file import from_yaml, to_yaml
from rankfold.training.launch.queue import run_queued
from rankfold.training.launch.start import train
from rankfold.training.runs import library


@pytest.fixture(scope="module")
def trained(base, images, tmp_path_factory):
    """A runs folder: two adapters of one base, one of them of a kind that no plain LoRA equals, and one that answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        root = tmp_path_factory.mktemp("studio") / "runs"
        short = quick_config(
            SubjectConfig,
            base=str(base), images=images, steps=3, batch_size=2, rank=4, alpha=4.0, learning_rate=0.02, log_every=1,
            checkpoint_every=3, preview_every=3, preview_prompts=("a {token} {noun}",), preview_steps=2, threads=1,
        )  # fmt: skip
        train(replace(short, out=root / "mine"))
        train(replace(short, out=root / "bent", adapter="fvae", preview_every=0, token="sks2"))
        data = tmp_path_factory.mktemp("colours")
        rows = []
        for number, name in enumerate(("red", "blue", "green") * 2):
            Image.new("RGB", (32, 32), name).save(data / f"{number}.png")
            turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": name}]
            rows.append({"image": f"{number}.png", "conversations": turns})
        (data / "data.json").write_text(json.dumps(rows))
        task = InstructConfig(
            data=data / "data.json", out=root / "colours", steps=6, batch_size=4, rank=4, alpha=4.0, learning_rate=0.02,
            checkpoint_every=6, preview_every=0, workers=0, threads=1,
        )  # fmt: skip
        train(task)
    return root


@pytest.fixture
def places(trained, base, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_LIBRARY", str(tmp_path / ".hidden" / "library"))
    return StudioPaths(trained, (base, images))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("upload") / "red.png"
    Image.new("RGB", (40, 32), "red").save(path)
    return str(path)


@cache
def handlers(places, page):
    """What the page's API calls, by name."""
    with gr.Blocks() as demo:
        page.build(Studio(places, start_workers=False))
    return {event.api_name: event.fn for event in demo.fns.values() if event.api_visibility == "public"}


def test_only_these_names_are_public(places):
    assert [set(handlers(places, page)) for page in (compose_page, chat_page, library_page)] == [
        {"compose"}, {"chat"}, {"library", "inspect", "export"},
    ]  # fmt: skip


def test_every_box_has_a_label_and_no_two_share_an_id(places):
    with gr.Blocks() as demo:
        for page in (compose_page, chat_page, library_page):
            page.build(Studio(places, start_workers=False))
    boxes = [box for box in demo.blocks.values() if isinstance(box, gr.components.Component)]
    ids = [box.elem_id for box in boxes if box.elem_id]
    assert len(ids) == len(set(ids))
    nameless = (gr.Markdown, gr.State, gr.BrowserState, gr.Button)
    assert all(box.label for box in boxes if not isinstance(box, nameless))


def test_no_box_of_numbers_is_empty(places):
    """Gradio shows an empty one as 0, and sends it."""
    with gr.Blocks() as demo:
        for page in (compose_page, chat_page, library_page, train_page, generate_page, compare_page):
            page.build(Studio(places, start_workers=False))
    boxes = [box for box in demo.blocks.values() if isinstance(box, gr.Number) and box.visible is True]
    assert len(boxes) > 20
    assert not [box.label for box in boxes if box.value is None]


# ---------------------------------------------------------------------------------------------- compose

ALIKE = {
    "weights": "",
    "set": "",
    "folder": "",
    "steps": 100,
    "rate": 0.05,
    "rank": 0,
    "base": "",
    "token": "",
    "noun": "",
}


def compose(places, names, how, run, **values):
    """Presses the button."""
    said, free = handlers(places, compose_page)["compose"](names, how, *(ALIKE | values).values(), run)
    assert f'href="/watch?run={run}"' in said
    assert free != run
    return places.run(run)


def test_composes_by_weights_and_says_what_it_was_made_of(places):
    train(replace(places.config("mine"), out=places.runs / "second", seed=5, token="ohwx", preview_every=0))
    run = compose(places, ["mine", "second"], "Custom weights", "both", weights="0.75, -0.5")
    assert run.state() == "queued"
    with pytest.raises(UserError, match="both is queued: its weights are here when it is done"):
        compose_page.describe_composition(places, "both")
    run_queued(run.folder)
    rows, lines = compose_page.describe_composition(places, "both")
    assert rows == [["mine", 0.75, 0.75, 0.75], ["second", -0.5, -0.5, -0.5]]
    assert lines == [f"weighted sum of 2 adapters for the base {places.config('mine').base}."]
    assert compose_page.read_facts(run.adapter).token == "sks"
    assert "both" in compose_page.composed_runs(places)
    assert not {"mine", "second"} & set(compose_page.composed_runs(places))
    assert [
        "both",
        "runs",
        *library_page.table_row(library_page.list_adapters(places)["mine"])[2:4],
        "lora, composed of 2",
    ] in [library_page.table_row(one) for one in library_page.list_adapters(places).values()]


def test_learns_weights_on_images_cut_to_a_rank(places, images):
    library_page.add_to_library(places, "mine", "kept", "")
    names = ["mine", "library: kept"]
    run = compose(
        places, names, "Learn from images", "few", folder=str(images), steps=2, rate=0.1, rank=3, token=" zwx "
    )
    config = places.config("few")
    assert (config.images, config.steps, config.learning_rate) == (images.resolve(), 2, 0.1)
    assert (config.max_rank, config.token, config.class_noun) == (3, "zwx", "creature")
    run_queued(run.folder)
    rows, lines = compose_page.describe_composition(places, "few")
    assert [row[0] for row in rows] == names
    assert sum(row[1] for row in rows) == pytest.approx(1.0, abs=2e-4)
    assert "one for each place" in lines[1]
    assert "missed by up to" in lines[2]


def test_images_of_an_uploaded_set(places, images):
    folder = places.upload_folder("cat")
    assert compose_page.image_sets(places) == ["cat"]
    assert compose_page.resolve_images(places, "cat", "") == folder
    with pytest.raises(UserError, match="leave one of them empty"):
        compose_page.resolve_images(places, "cat", str(images))
    with pytest.raises(UserError, match=r"no set of images named \.\./mine"):
        compose_page.resolve_images(places, "../mine", "")


@pytest.mark.parametrize(
    ("names", "how", "values", "run", "sentence"),
    [
        ([], "Equal", {}, "x", "No adapter has been chosen"),
        (["nobody"], "Equal", {}, "x", "There is no adapter named nobody"),
        (["../mine/adapter"], "Equal", {}, "x", "There is no adapter named"),
        (["mine"], "by magic", {}, "x", "is not a way to compose"),
        (["mine"], "Custom weights", {"weights": "0.5 0.5"}, "x", "There are 2 weights for 1 adapters"),
        (["mine"], "Custom weights", {"weights": "half"}, "x", "are not numbers"),
        (["mine"], "Custom weights", {"weights": "inf"}, "x", "are not all finite"),
        (["mine"], "Learn from images", {}, "x", "need a few images"),
        (["mine"], "Learn from images", {"folder": "/"}, "x", "lies outside what the studio may read"),
        (["mine"], "Learn from images", {"folder": "/nowhere"}, "x", "outside what the studio may read"),
        (["mine"], "Equal", {"rank": -1}, "x", "“max rank” must be at least 0"),
        (["mine"], "Equal", {"base": "tiny"}, "x", "was trained on"),
        (["mine"], "Equal", {"base": "/etc"}, "x", "lies outside"),
        (["mine"], "Equal", {}, "mine", "There is a run named mine already"),
        (["mine"], "Equal", {}, "../x", "is not a valid name of a run"),
    ],
)
def test_mistakes_in_composing(places, names, how, values, run, sentence):
    with pytest.raises(gr.Error, match=sentence):
        compose(places, names, how, run, **values)
    assert not (places.runs / "x").exists()


def test_a_preview_is_the_weighted_sum(places):
    """The adapters at the composition's weights; what cannot be known yet is refused."""
    with gr.Blocks():
        preview = ComposePreview(Studio(places, start_workers=False))
    values = ALIKE | {"weights": "0.75 -0.5"}
    config = compose_page.parse_config(places, ["mine", "bent"], "Custom weights", values, "x")
    recipe = preview.recipe(config, ["mine", "bent"], "", 3)
    assert recipe.strengths == (0.75, -0.5)
    assert (recipe.prompt, recipe.seed) == ("a sks creature and a sks2 creature", 3)
    alike = compose_page.parse_config(places, ["mine", "bent"], "Equal", ALIKE, "x")
    assert preview.recipe(alike, ["mine", "bent"], "b", 3).strengths == (0.5, 0.5)
    *_, (said, image) = preview.draw(alike, ["mine", "bent"], "b", 3)
    assert "It is not kept" in said
    assert image.size == (64, 64)
    with pytest.raises(UserError, match="known when they are learned"):
        preview.recipe(replace(alike, images=places.runs), ["mine", "bent"], "b", 3)
    assert not (places.runs / "x").exists()


def test_what_was_not_composed_is_said(places):
    with pytest.raises(UserError, match="mine was not composed"):
        compose_page.describe_composition(places, "mine")


# ---------------------------------------------------------------------------------------------- generate


def test_a_card_adds_its_adapter_and_offers_its_trigger_words(places):
    generate = generate_page.GeneratePage(Studio(places, start_workers=False))
    names = [one.name for one in generate.cards()]
    assert {"mine", "bent"} <= set(names)
    assert "colours" not in names
    rows = [value for _ in range(24) for value in (True, "", 1.0)]
    click = SimpleNamespace(index=names.index("mine"))
    said, offer, words, *changes = generate.add_card(click, 1, *rows)
    assert "mine is added" in said
    assert (offer.value, words) == ("Put “sks creature” into the prompt", "sks creature")
    assert changes[:3] == [True, "mine", 1.0]
    rows[1] = "bent"
    _, _, _, *changes = generate.add_card(click, 1, *rows)
    assert changes[3:6] == [True, "mine", 1.0]
    assert changes[72] == 2  # rows that are shown
    rows[1] = "mine"
    with pytest.raises(UserError, match="among the adapters already"):
        generate.add_card(click, 1, *rows)


def test_what_an_image_starts_from_is_kept_and_found_by_name_alone(places, image, tmp_path):
    kept = keep_start(places, image, "The image")
    assert kept_start(places, kept) == kept
    assert keep_start(places, image, "The image") == kept
    with pytest.raises(UserError, match="is not here"):
        kept_start(places, image)
    (tmp_path / "page.png").write_text("no image")
    with pytest.raises(UserError, match="The mask cannot be used"):
        keep_start(places, str(tmp_path / "page.png"), "The mask")


# ---------------------------------------------------------------------------------------------- chat


def chat(handler, before, question, *, tuned="", base="", image=None, compare=False, most=12, precision="fp32"):
    """Asks; returns all that the page is sent."""
    return list(handler(before, tuned, base, image, question, compare, most, precision))


def test_an_answer_of_the_base_comes_in_pieces(places, image):
    models, talk = ChatModels(), ChatState(ChatModelSpec("tiny-vlm"), image)
    *pieces, last = chat_page.ask(models, talk, "What is in the picture?", compare=True, most=12)
    texts = [piece.tuned for piece in pieces]
    known = answers(open_chat("tiny-vlm"), [chat_page.add_question(talk, "What is in the picture?")], max_new_tokens=12)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert chat_page.bubbles(last) == (
        [{"role": "user", "content": "What is in the picture?"}, {"role": "assistant", "content": known[0]}],
        [],  # it is the base itself that answers
    )
    assert not models.loaded.model.model._forward_pre_hooks


def test_the_tuned_model_and_its_base_answer_side_by_side_over_several_questions(places, image):
    handler = handlers(places, chat_page)["chat"]
    shown = chat(handler, ChatState(), "What colour?", tuned="colours", image=image, compare=True)
    assert shown[0][1] == [{"role": "user", "content": "What colour?"}]
    talk, own, base, said, _ = shown[-1]
    row = chat_page.add_question(ChatState(image=image), "What colour?")
    adapter = places.adapter("colours", chat=True)
    assert own[-1]["content"] == answers(open_chat("tiny-vlm", [adapter]), [row], max_new_tokens=12)[0]
    assert base[-1]["content"] == answers(open_chat("tiny-vlm"), [row], max_new_tokens=12)[0]
    assert own[-1] != base[-1]
    assert said == ""
    again, own, base, *_ = chat(handler, talk, "And <b>now</b>?", tuned="colours", image=image)[-1]
    assert [len(own), len(base)] == [4, 2]
    assert own[2]["content"] == "And &lt;b&gt;now&lt;/b&gt;?"  # Gradio takes text for HTML
    content = [part["type"] for message in again.messages for part in message["content"]]
    assert content == ["image", "text", "text", "text", "text"]
    fresh, own, *_ = chat(handler, again, "What colour?", image=image)[-1]  # another model, another conversation
    assert len(own) == len(fresh.messages) == 2


def test_a_model_stays_loaded_until_another_is_wanted(places):
    models, base = ChatModels(), ChatModelSpec("tiny-vlm")
    first = models.open_model(base)
    assert models.open_model(ChatModelSpec("tiny-vlm")) is first
    other = models.open_model(chat_page.parse_model_spec(places, "colours", "", "fp32"))
    assert other is not first
    assert models.open_model(base) is not first


def test_pages_share_the_one_model_in_memory(places):
    loaded = ModelCache()
    models, pipes = ChatModels(loaded), PipelineWorker(loaded)
    first = weakref.ref(models.open_model(ChatModelSpec("tiny-vlm")))
    pipe = pipes.pipeline(Recipe(prompt="", base="tiny"))
    assert first() is None
    assert pipes.pipeline(Recipe(prompt="another", base="tiny")) is pipe


def test_stopping_ends_behind_a_token_and_the_model_answers_on(places, image):
    models, talk, said, drawing = (
        ChatModels(),
        ChatState(ChatModelSpec("tiny-vlm"), image),
        PartialAnswers(),
        Job(100),
    )
    row = chat_page.add_question(talk, "What is in the picture?")
    step = drawing.step

    def stop_at_two():
        drawing.stopped = drawing.done == 1
        step()

    drawing.step = stop_at_two
    with pytest.raises(JobStopped):
        models.answer(talk.who, row, said, drawing, compare=False, most=12)
    assert drawing.done == 2
    assert not models.loaded.lock.locked()
    drawing.stopped = True
    with pytest.raises(JobStopped):
        models.answer(talk.who, row, said, drawing, compare=False, most=12)
    assert isinstance(list(chat_page.ask(models, talk, "And now?", compare=False, most=12))[-1], ChatState)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"question": " \n"}, "The question is empty"),
        ({"tuned": "nobody"}, "There is no adapter named nobody"),
        ({"tuned": "mine"}, "There is no adapter named mine"),
        ({"base": "/etc"}, "lies outside what the studio may read"),
        ({"base": "nothing/../here"}, "outside what the studio may read"),
        ({"most": 0}, "must be between 1 and"),
        ({"most": None}, "must be between 1 and"),
        ({"precision": "int3"}, "is not a dtype"),
    ],
)
def test_mistakes_in_chat(places, values, sentence):
    with pytest.raises(gr.Error, match=sentence):
        chat(handlers(places, chat_page)["chat"], ChatState(), **({"question": "What colour?"} | values))


def test_a_text_file_is_no_image(places, tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("no image")
    with pytest.raises(gr.Error, match=r"^'notes\.png is not a valid image"):
        chat(handlers(places, chat_page)["chat"], ChatState(), "What colour?", image=str(file))


def test_a_failed_answer_leaves_the_conversation_as_it_was(places, monkeypatch):
    def broken(*_):
        raise UserError("The model is gone.")
        yield

    handler = handlers(places, chat_page)["chat"]
    talk = chat(handler, ChatState(), "What colour?")[-1][0]
    monkeypatch.setattr(chat_page, "stream", lambda *_, **__: broken())
    sent = []
    with pytest.raises(gr.Error, match=r"The model is gone\."):
        sent.extend(handler(talk, "", "", None, "Again?", False, 12, "fp32"))
    before, own, _, said, question = sent[-1]
    assert (before, len(own), said, question) == (
        talk,
        2,
        "",
        "Again?",
    )  # without the question, which is in its box again


# ---------------------------------------------------------------------------------------------- library


def test_lists_runs_and_library_with_thumbnails(places):
    rows, images = handlers(places, library_page)["library"]()
    base = places.config("mine").base
    assert ["mine", "runs", base, "sks creature", "moslora"] in rows
    assert ["colours", "runs", "tiny-vlm", "-", "moslora"] in rows
    assert len(images) == len(rows)
    assert "kept is in the library" in library_page.add_to_library(places, "mine", "kept", " my words ")
    rows, images = handlers(places, library_page)["library"]()
    assert ["library: kept", "library", base, "my words", "moslora"] in rows
    assert [image.size for image, name in images if name.startswith("library: kept · ")] == [(64, 64)]


@pytest.mark.parametrize(
    ("adapter", "name", "sentence"),
    [
        ("mine", "../kept", "is not a valid name of a library's adapter"),
        ("mine", "", "is not a valid name of a library's adapter"),
        ("", "kept", "No adapter has been chosen"),
        ("nobody", "kept", "There is no adapter named nobody"),
        ("colours", "kept", "is not a run's adapter of a diffusion model"),
        ("mine", "there", "has an adapter named there already"),
        ("library: there", "kept", "is not a run's adapter"),
    ],
)
def test_mistakes_in_adding(places, adapter, name, sentence):
    library_page.add_to_library(places, "mine", "there", "")
    with pytest.raises(UserError, match=sentence):
        library_page.add_to_library(places, adapter, name, "")
    assert [entry.name for entry in library.entries()] == ["there"]


def test_inspects_an_adapter_against_its_base(places):
    rows, layers, said = handlers(places, library_page)["inspect"]("mine", None, True)
    facts = dict(rows)
    assert facts["adapter"] == "moslora"
    assert facts["unet: r"] == "4"
    assert "median" in facts["change"]
    assert len(layers) == 56
    assert all(row[6] == "" and row[5].endswith("%") for row in layers)
    assert "No problems found" in said
    assert library_page.inspect_source(places, "colours", None, True)[1]
    with pytest.raises(UserError, match=r"is not linear|no exact"):
        library_page.inspect_source(places, "bent", None, True)


def test_inspects_a_file(places, tmp_path):
    _, files = library_page.export_files(places, "mine", "kohya", approximate=False, max_error=0.05, drop_bias=False)
    rows, layers, said = library_page.inspect_source(places, None, files[0], False)
    assert dict(rows)["format"] == "kohya"
    assert dict(rows)["loads in kohya tools, A1111, ComfyUI"] == "yes"
    assert len(layers) == 56
    assert said == ["No problems found: no layer is zero or not finite."]
    broken = tmp_path / "broken.safetensors"
    broken.write_text("nothing")
    with pytest.raises(UserError, match=r"^broken\.safetensors is corrupted"):
        library_page.inspect_source(places, None, str(broken), False)
    with pytest.raises(UserError, match="No adapter has been chosen"):
        library_page.inspect_source(places, None, None, False)


def test_a_spoilt_adapter_is_seen(places, tmp_path):
    from safetensors.torch import load_file, save_file

    library_page.add_to_library(places, "mine", "spoilt", "")
    file = library.get("spoilt").path / "unet" / "adapter_model.safetensors"
    state = load_file(file)
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, file)
    *_, advice = library_page.inspect_source(places, "library: spoilt", None, False)
    assert advice == ["unet holds NaN or infinity: it is corrupted; take an earlier checkpoint and train again."]


def test_an_exported_file_does_the_same_in_a_stock_pipeline(places, base):
    said, files = handlers(places, library_page)["export"]("mine", "diffusers", False, 0.05, False)
    assert "It is exact." in said
    assert files == [str(places.runs / "_exports" / "mine" / "mine.safetensors")]
    stock = StableDiffusionPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(files[0])
    own = load_pipeline(Recipe(prompt="", base=str(base), adapters=(str(places.adapter("mine")),), strengths=(1.0,)))
    draw = {"seeds": [3], "steps": 2, "guidance_scale": 2.0, "width": 64, "output_type": "np"}
    images = [torch.from_numpy(denoise(pipe, ["a sks creature"], **draw)) for pipe in (stock, own)]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)
    plain = torch.from_numpy(denoise(StableDiffusionPipeline.from_pretrained(base), ["a sks creature"], **draw))
    assert (plain - images[0]).abs().max() > 1e-3


def test_a_peft_folder_comes_as_a_zip(places, tmp_path):
    from peft import PeftModel

    library_page.add_to_library(places, "mine", "kept", "")
    _, files = library_page.export_files(
        places, "library: kept", "peft", approximate=False, max_error=0.05, drop_bias=False
    )
    assert Path(files[0]).name == "library-kept-peft.zip"
    with zipfile.ZipFile(files[0]) as archive:
        archive.extractall(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(places.config("mine").base)
    wrapped = PeftModel.from_pretrained(pipe.unet, str(tmp_path / "peft" / "unet"))
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 56
    lines, files = library_page.export_files(
        places, "colours", "peft", approximate=False, max_error=0.05, drop_bias=False
    )
    assert lines[0].startswith("Read back by PEFT: largest difference of a probability")
    assert Path(files[0]).name == "colours-peft.zip"


def test_what_no_format_says_exactly_is_approximated_when_asked_for(places):
    export = handlers(places, library_page)["export"]
    with pytest.raises(gr.Error, match="“approximate”"):
        export("bent", "diffusers", False, 0.05, False)
    said, files = export("bent", "diffusers", True, 0.05, False)
    assert "An approximation: a layer" in said
    assert Path(files[0]).parent == places.runs / "_exports" / "bent"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("nobody", "diffusers", False, 0.05, False), "There is no adapter named nobody"),
        (("../../etc", "diffusers", False, 0.05, False), "There is no adapter named"),
        (("mine", "zip", False, 0.05, False), "'zip' is not a format: choose one of diffusers, peft, comfyui, kohya"),
        (("mine", "diffusers", True, 3, False), r"must be in \(0, 1"),
        (("colours", "kohya", False, 0.05, False), "choose the format peft"),
    ],
)
def test_mistakes_in_exporting(places, values, sentence):
    with pytest.raises(gr.Error, match=sentence):
        handlers(places, library_page)["export"](*values)


def test_a_base_outside_is_not_read(places, tmp_path, trained):
    with pytest.raises(UserError, match="start it with --readable"):
        library_page.export_files(
            replace(places, readable=()), "mine", "peft", approximate=False, max_error=0.05, drop_bias=False
        )


def test_errors_name_boxes_and_are_text():
    """By the words of the form, not by the flags of the command line; nothing in them is markup."""
    from rankfold.apps.studio.render.messages import message_html, name_settings, show_errors

    said = "--max-rank must be at least 0: see `rankfold compose --max-rank 4`."
    assert name_settings(said) == "“max rank” must be at least 0: see `rankfold compose --max-rank 4`."
    assert "“max rank”" in message_html(said, "fault")

    @show_errors
    def fail():
        raise UserError("There is no run <img src=//elsewhere/x>.")

    with pytest.raises(gr.Error) as caught:
        fail()
    assert caught.value.message == "There is no run &lt;img src=//elsewhere/x&gt;."


def test_a_file_of_another_tool_is_imported(places, tmp_path):
    _, files = library_page.export_files(places, "mine", "kohya", approximate=False, max_error=0.05, drop_bias=False)
    assert Path(files[0]).name == "mine-kohya.safetensors"
    base = places.config("mine").base
    assert "brought is in the library" in library_page.import_file(files[0], "brought", base, "sks creature")
    assert library.get("brought").trigger == "sks creature"
    with pytest.raises(UserError, match="has an adapter named brought already"):
        library_page.import_file(files[0], "brought", base, "")
    (tmp_path / "no.safetensors").write_text("nothing")
    with pytest.raises(UserError, match=r"^no\.safetensors is"):
        library_page.import_file(str(tmp_path / "no.safetensors"), "no", base, "")


def test_a_push_names_its_repository_and_is_private(places, monkeypatch):
    """All but the network: what the hub's client would be called with, and what lies in the folder that it is given."""
    import huggingface_hub

    calls = []

    class Hub:
        public = False

        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, **more):
            calls.append((name, more))

        def repo_info(self, name):
            return SimpleNamespace(private=not Hub.public)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(
                (repo_id, sorted(path.name for path in folder_path.iterdir()), (folder_path / "README.md").read_text())
            )

    with gr.Blocks():
        push = library_page.LibraryPage(Studio(places, start_workers=False)).push
    export = ("mine", "diffusers", False, 0.05, False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the Hugging Face Hub"):
        push("me/cat", True, *export)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for wrong in ("cat", "me/../cat", "", None, "a/b/c"):
        with pytest.raises(UserError, match="give it as USER/NAME"):
            push(wrong, True, *export)
    assert "mine is at me/cat, private" in push(" me/cat ", True, *export)
    token, created, (name, files, card) = calls
    assert (token, created) == ("hf_x", ("me/cat", {"private": True, "exist_ok": True}))
    assert (name, files) == ("me/cat", ["README.md", "mine.safetensors"])
    assert "instance_prompt: 'sks creature'" in card
    assert str(places.runs) not in card
    Hub.public = True
    with pytest.raises(UserError, match="there already and public"):
        push("me/cat", True, *export)
    assert len(calls) == 5  # nothing was uploaded


def test_an_image_knows_its_adapter_by_content_wherever_it_lies(places):
    content = content_hash(adapter_path(places.adapter("mine")))
    made = Recipe(prompt="x", adapters=("/before/it/was/renamed",), strengths=(1.0,), hashes=(content,))
    assert recalled_adapters(places, made) == ["mine"]
    with pytest.raises(UserError, match="neither in"):
        recalled_adapters(places, replace(made, hashes=("another",)))
    with pytest.raises(UserError, match="has changed since"):
        recalled_adapters(places, replace(made, adapters=(str(places.adapter("mine")),), hashes=("another",)))


def test_empty_boxes_for_steps_and_guidance_mean_the_bases_own(places, base, trained, tmp_path):
    """As `rankfold sample` does: of the run whose adapter is taken, otherwise of the base."""

    def numbers(base, **given):
        values = {"steps": None, "guidance_scale": None, "width": 0, "height": 0, "seed": 0} | given
        recipe = build_recipe(places, base, "a creature", "", values, ())
        return recipe.steps, recipe.guidance_scale

    assert numbers("tiny") == (25, 4.0)
    assert numbers("tiny-turbo") == (4, 1.0)
    assert numbers(str(base)) == (25, 7.5)  # as StableDiffusionPipeline has it
    assert numbers(str(base), steps=3, guidance_scale=0) == (3, 0.0)
    with pytest.raises(UserError, match="as steps"):
        numbers(str(base), steps=0)
    config = replace(from_yaml(trained / "mine" / "config.yaml"), guidance_scale=1.0, preview_steps=6)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert drawing_numbers(str(base), [str(tmp_path / "run" / "adapter")], None, None) == (6, 1.0)
    assert [box["placeholder"] for box in base_numbers(places, "tiny-turbo")] == ["4", "1"]
    assert base_numbers(places, "/nowhere") == (gr.skip(), gr.skip())


def test_adapters_with_one_trigger_word_are_warned_of(places):
    library_page.add_to_library(places, "mine", "again", "")
    found = compose_page.collision_note(places, ["mine", "library: again", "bent"])
    assert "mine, library: again share the trigger word sks" in found
    assert compose_page.collision_note(places, ["mine", "bent"]) == ""


def test_a_mistake_leaves_everything_else_on_the_page_as_it_is():
    from rankfold.apps.studio.widgets.actions import beside

    def fail(text):
        raise UserError(f"There is no <b>{text}</b>: set --max-rank.")

    values = beside(fail, 1, 3)("x")
    assert values[0] == values[2] == gr.skip()
    assert "no &lt;b&gt;x&lt;/b&gt;: set “max rank”" in values[1]

    def begin(text):
        yield 1, "", 2
        fail(text)

    first, second = beside(begin, 1, 3)("x")
    assert first == (1, "", 2)
    assert second == values
