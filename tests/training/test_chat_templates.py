"""Chat templates that think, that strip answers, or that leave words out; what images become by formulas; limits of pixels."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlms import build
from transformers import AutoModelForImageTextToText, AutoProcessor

from rankfold.pipelines.chat import open_chat
from rankfold.pipelines.export_chat import export_chat
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.conversations import Conversation, parse_conversation
from rankfold.toolkit.vlm.model import VisionLanguageModel
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.evaluation.items import read_items
from rankfold.training.instruct.conversations import plan_rows
from rankfold.training.instruct.loss import AnswerLoss
from rankfold.training.launch.start import train

SIZES = ((40, 30), (33, 80), (100, 30), (256, 256), (700, 123))
HEAD = "{%- for m in messages -%}{%- set body = m.content | map(attribute='text') | join -%}"
SIMPLE = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ body ~ '<|im_end|>\n' }}{%- endfor -%}"
ASK = "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt else '' }}"
ASSISTANT = "{%- if m.role == 'assistant' -%}"
BARE = "{%- set body = body.split('</think>')[-1].lstrip('\n') -%}"
STRIPS = HEAD + ASSISTANT + BARE + "{%- endif -%}" + SIMPLE + ASK  # thoughts are nowhere
LAST = (  # thoughts only in the last answer, an empty one where there is none
    HEAD + ASSISTANT + "{%- set thought = body.split('</think>')[0].split('<think>')[-1] if '</think>' in body else '' -%}" + BARE
    + "{%- set thought = thought.strip('\n') -%}"
    + "{%- if loop.last -%}{%- set body = '<think>\n' ~ thought ~ '\n</think>\n\n' ~ body -%}{%- endif -%}{%- endif -%}" + SIMPLE + ASK
)  # fmt: skip
TRIMS = (
    HEAD
    + ASSISTANT
    + "{%- set body = body | trim -%}{%- endif -%}"
    + SIMPLE
    + "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
DROPS = (
    HEAD
    + "{%- if m.role != 'system' -%}"
    + SIMPLE.replace("{%- endfor", "{%- endif -%}{%- endfor")
    + ASK.replace("<think>\n", "")
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(build("qwen3-vl", tmp_path_factory.mktemp("qwen") / "base"))


def turns(*answers):
    return {
        "messages": [
            m
            for a in answers
            for m in ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": a})
        ]
    }


def learned(chat, row):
    tokens = chat.verify_labels(row, [])
    return chat.tokenizer.decode([label for label in tokens.labels if label >= 0])


@pytest.mark.parametrize("template", [STRIPS, LAST])
def test_thoughts_are_learned_as_they_are_asked_for(base, tmp_path, template):
    chat = VisionLanguageModel(base, template=template).chat
    row = lambda *answers: parse_conversation(turns(*answers), tmp_path, "row 1")  # noqa: E731
    assert learned(chat, row("<think>\n4 sides\n</think>\n\na square")) == "4 sides\n</think>\n\na square<|im_end|>"
    assert learned(chat, row("a square")) == "</think>\n\na square<|im_end|>"
    assert learned(chat, row("red", "blue")) == "</think>\n\nblue<|im_end|>"
    (tmp_path / "data.json").write_text(json.dumps([turns("red", "blue"), turns("it")]))
    config = InstructConfig(data=tmp_path / "data.json", base=base)
    planned = plan_rows(config.data, config, chat)
    assert [learned(chat, own) for own in planned.rows] == [
        f"</think>\n\n{word}<|im_end|>" for word in ("red", "blue", "it")
    ]
    assert planned.split == 1


def test_an_answer_that_the_template_trims_is_learned_so(base, tmp_path):
    chat = VisionLanguageModel(base, template=TRIMS).chat
    assert learned(chat, parse_conversation(turns("  red "), tmp_path, "row 1")) == "red<|im_end|>"


def test_a_template_that_takes_text_is_given_text(base, tmp_path):
    """And one that refuses a row says so in a sentence."""
    text = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    chat = VisionLanguageModel(base, template=text + ask).chat
    assert learned(chat, parse_conversation(turns("red"), tmp_path, "row 1")) == "red<|im_end|>"
    assert "'type'" not in chat.render_text(parse_conversation(turns("red"), tmp_path, "row 1").messages)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + text + ask
    row = parse_conversation({"system": "S", **turns("red")}, tmp_path, "row 1")
    with pytest.raises(UserError, match=r"refuses the conversation .no system prompts"):
        VisionLanguageModel(base, template=strict).chat.verify_labels(row, [])


def test_a_system_prompt_that_the_template_drops_is_refused(base, tmp_path):
    chat = VisionLanguageModel(base, template=DROPS).chat
    row = parse_conversation({"system": "Answer in French.", **turns("red")}, tmp_path, "row 1")
    with pytest.raises(UserError, match="leaves out or changes words of the system prompt"):
        chat.verify_labels(row, [])


def test_weights_of_turns_are_those_of_their_tokens(base, tmp_path):
    """Half a weight is half the loss of these tokens, and none is none."""
    vision = VisionLanguageModel(base)
    loss, whole = AnswerLoss(vision.model), turns("red", "blue square")

    def losses(*flags):
        for message, flag in zip(whole["messages"][1::2], flags, strict=True):
            message["weight"] = flag
        batch = vision.chat.collate([parse_conversation(whole, tmp_path, "x")], [[]])
        with torch.no_grad():
            return float(loss(vision.to_device(batch) | {"weight": torch.tensor(1.0)})[0])

    both, first, second = losses(1, 1), losses(1, 0), losses(0, 1)
    assert both == pytest.approx(first + second, rel=1e-5)
    assert losses(0.5, 1) == pytest.approx(first / 2 + second, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["qwen2.5-vl", "llava", "llava-next", "llava-onevision", "internvl", "smolvlm", "gemma3", "paligemma", "mistral3"],
)
def test_formulas_say_what_processors_write(tmp_path, name):
    """Of one image and of two; and the quick count of a row's tokens is that of all of them."""
    chat = VisionLanguageModel(str(build(name, tmp_path / "base"))).chat
    images = chat.images
    for size in SIZES:
        assert images.replacements((size,)) == images.process((size,))
    if name != "paligemma":
        assert images.replacements(SIZES[:2]) == images.process(SIZES[:2])
    assert images.formula_holds
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    row = Conversation(
        (message, {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}), (b"",), "x"
    )
    for size in SIZES:
        tokens, quick = chat.labels_by_marks(row, [size]), chat.measure(row, [size])
        assert (len(tokens.ids), tokens.num_learned) == (quick.length, quick.num_learned)


def test_a_size_that_no_processor_takes_is_a_sentence(base):
    with pytest.raises(UserError, match="does not take an image of 900 x 4 pixels"):
        VisionLanguageModel(base).chat.replacements(((900, 4),))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("qwen2.5-vl", 40 * 40),
        ("internvl", 28 * 28),
        ("smolvlm", 28 * 28),
        ("llava-next", 28 * 56),
        ("mistral3", 28 * 28),
    ],
)
def test_fewer_pixels_are_fewer_tokens_and_are_exported(tmp_path, name, most):
    folder = str(build(name, tmp_path / "base"))
    tokens = lambda chat: chat.images.token_counts(((300, 280),))[0]  # noqa: E731
    limited = VisionLanguageModel(folder, max_pixels=most)
    assert tokens(limited.chat) < tokens(VisionLanguageModel(folder).chat)
    limited.processor.save_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    image = Image.new("RGB", (300, 280))
    count = lambda processor: len(processor(text=[limited.chat.image_mark], images=[[image]])["input_ids"][0])  # noqa: E731
    assert count(again) == count(limited.processor)
    with pytest.raises(UserError, match="--max-pixels 3 is less than"):
        VisionLanguageModel(folder, max_pixels=3)


# ---------------------------------------------------------------------------------------------- exports and other trainers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.effect_noise((90, 40), 80).convert("RGB").save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([{"image": "a.png", "question": "what is it?", "answer": "red"}]))
    return folder / "data.json"


def run_of(base, data, out, **more):
    settings = {
        "adapter": "lora",
        "rank": 4,
        "steps": 2,
        "batch_size": 1,
        "learning_rate": 0.02,
        "preview_every": 0,
        "workers": 0,
    }
    return train(InstructConfig(base=base, data=data, out=out, threads=1, **(settings | more)))


def test_a_merged_model_has_its_bases_dtype_and_pads_by_itself(tmp_path, data):
    folder = build("llava", tmp_path / "base")
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    run = run_of(str(folder), data, tmp_path / "run", pad_to_square=True)
    proof = export_chat(run.adapter, str(folder), "merged", tmp_path / "out")
    assert proof.difference < 1e-5
    assert {tensor.dtype for tensor in load_file(proof.path / "model.safetensors").values()} == {torch.bfloat16}
    assert type(AutoProcessor.from_pretrained(proof.path).image_processor).__name__.startswith("LlavaImageProcessor")
    assert load_file(
        export_chat(run.adapter, str(folder), "merged", tmp_path / "whole", dtype="fp32").path / "model.safetensors"
    )
    with pytest.raises(UserError, match="padding to squares"):
        export_chat(run.adapter, str(folder), "vllm", tmp_path / "out")


def test_a_tied_head_is_untied(base, data, tmp_path):
    run = run_of(base, data, tmp_path / "run", target_modules=("q_proj", "lm_head"))
    assert export_chat(run.adapter, base, "merged", tmp_path / "out").difference < 1e-5


def test_a_folder_for_vllm(base, data, tmp_path):
    """One rank and alpha, no other tensors; the tower and the projector are refused, as vLLM would leave them out."""
    run = run_of(base, data, tmp_path / "run")
    proof = export_chat(run.adapter, base, "vllm", tmp_path / "out")
    config = json.loads((proof.path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == base
    assert all(
        name.endswith((".lora_A.weight", ".lora_B.weight"))
        for name in load_file(proof.path / "adapter_model.safetensors")
    )
    assert any("--max-lora-rank 8" in note for note in proof.notes)
    for number, more in enumerate(({"target_parts": ("vision-attention",)}, {"train_projector": True})):
        other = run_of(base, data, tmp_path / f"run{number}", **more)
        with pytest.raises(UserError, match="--format merged"):
            export_chat(other.adapter, base, "vllm", tmp_path / "out")
        assert not (tmp_path / "out" / "vllm.partial").exists()


def test_peft_folders_of_other_trainers(base, tmp_path):
    """As PEFT writes them now, as it did when transformers called the parts by other names, and with a tensor too many."""
    theirs, old, strange = tmp_path / "theirs", tmp_path / "old", tmp_path / "strange"
    model = AutoModelForImageTextToText.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(theirs)
    state = load_file(theirs / "adapter_model.safetensors")
    for folder, renamed in (
        (old, {name.replace("model.language_model.layers", "model.layers"): tensor for name, tensor in state.items()}),
        (strange, state | {"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 4)}),
    ):
        folder.mkdir()
        save_file(renamed, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text((theirs / "adapter_config.json").read_text())
    own, older = open_chat(base, [theirs]).model, open_chat(base, [old]).model
    assert set(adapter_layers(own)) == set(adapter_layers(older))
    for name, layer in adapter_layers(own).items():
        assert torch.equal(layer.lora_B["adapter_0"].weight, older.get_submodule(name).lora_B["adapter_0"].weight)
    with pytest.raises(UserError, match=r"no place for nowhere\.lora_A\.weight"):
        open_chat(base, [strange])


def test_more_left_out_than_may_be_stops(base, data, tmp_path):
    rows = json.loads(data.read_text())
    rows += [{"question": "say it " * 50, "answer": "red"}] * 3
    (data.parent / "long.json").write_text(json.dumps(rows))
    config = InstructConfig(base=base, data=data.parent / "long.json", out=tmp_path / "run", max_length=90, steps=1)
    with pytest.raises(UserError, match=r"75% of the rows would be left out.*--max-length"):
        train(replace(config, max_left_out=0.5))


# ---------------------------------------------------------------------------------------------- places in images


@pytest.mark.parametrize(
    ("name", "pad", "text"),
    [
        ("qwen2.5-vl", False, "[21, 7, 42, 28]"),  # 100 x 40 becomes 84 x 28
        ("qwen3-vl", False, "[250, 250, 500, 1000]"),
        ("internvl", False, "[250, 250, 500, 1000]"),
        ("paligemma", False, "<loc0256><loc0256><loc1023><loc0512>"),
        ("llava", True, "[0.250, 0.400, 0.500, 0.700]"),  # in the square of 100 x 100, 30 pixels lower
        ("llava", False, "[0.000, 0.250, 0.500, 1.000]"),  # of the middle 40 x 40, from 30 on
    ],
)
def test_boxes_are_written_as_each_base_knows_them(tmp_path, name, pad, text):
    chat = VisionLanguageModel(str(build(name, tmp_path / "base")), pad_to_square=pad).chat
    place = {"numbers": (25, 10, 50, 40), "unit": "pixels", "image": 0}
    grounding = chat.grounding
    if name == "qwen2.5-vl":
        pixels = chat.processor.image_processor
        _, high, wide = pixels(images=[Image.new("RGB", (100, 40))])["image_grid_thw"][0]
        assert grounding.resized((100, 40)) == (wide * pixels.patch_size, high * pixels.patch_size) == (84, 28)
    assert grounding.write(place, (100, 40)) == text
    assert grounding.write({"numbers": (0.25, 0.25, 0.5, 1), "unit": "relative", "image": 0}, (100, 40)) == text
    found = grounding.read(f"It is at {text}.", (100, 40))
    if not (name == "llava" and not pad):
        assert found == pytest.approx((25, 10, 50, 40), abs=0.25)
    with pytest.raises(UserError, match="not in its image"):
        grounding.write(place, (30, 30))


def test_boxes_are_learned_and_scored(tmp_path):
    vision = VisionLanguageModel(str(build("qwen3-vl", tmp_path / "base")))
    Image.new("RGB", (100, 40), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "objects": {"bbox": [[25, 10, 50, 40]]}, "question": "Where?", "answer": "<bbox>"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    own = parse_conversation(row, tmp_path, "row 1")
    tokens = vision.chat.verify_labels(own, [Image.open(tmp_path / "a.png")])
    assert (
        vision.chat.tokenizer.decode([label for label in tokens.labels if label >= 0])
        == "[250, 250, 500, 1000]<|im_end|>"
    )
    [item] = read_items(tmp_path / "data.json", None)
    score = lambda text: item.score(item.parse_answer(item.place(text, vision)))  # noqa: E731
    assert item.kind == "box"
    assert [score(text) for text in ("[250, 250, 500, 1000]", "[260, 250, 520, 990]", "[0, 0, 100, 100]", "there")] == [
        1,
        1,
        0,
        0,
    ]
    assert item.iou("25 10 50 25") == pytest.approx(0.5)
