"""Every family of vision-language models, as random tiny models of the true classes: labels, batches, training, files, merging."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from short_runs import train_until
from tiny_vlms import BUILDERS, build
from transformers import AutoModelForImageTextToText

from rankfold.pipelines.chat import answers, base_model_only, open_chat, question_inputs
from rankfold.pipelines.export_chat import export_chat
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.conversations import parse_conversation
from rankfold.toolkit.vlm.chat_tokens import IGNORE
from rankfold.toolkit.vlm.families import FAMILIES, PARTS
from rankfold.toolkit.vlm.model import VisionLanguageModel, resolve_vision_base
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.instruct.conversations import load_images
from rankfold.training.instruct.loss import AnswerLoss
from rankfold.training.launch.start import resume, train

ADAPTERS = ("lora", "moslora", "fvae", "loratrf", "glora")
ROWS = [
    {"image": "a.png", "question": "what is it", "answer": "3 red squares"},
    {
        "images": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image> this is what"},
            {"from": "gpt", "value": "the circle\nis blue"},
            {"from": "human", "value": "and it?"},
            {"from": "gpt", "value": "green"},
        ],
    },
    {
        "image": "b.png",
        "messages": [
            {"role": "system", "content": "Be short"},
            {"role": "user", "content": "what"},
            {"role": "assistant", "content": "a blue circle"},
        ],
    },
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]},
]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_noise((40, 40), 80).convert("RGB").save(folder / "a.png")
    Image.effect_noise((90, 40), 80).convert("RGB").save(folder / "b.png")
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """name -> folder of its tiny model, built when first asked for."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def folder(name):
        if name not in made:
            made[name] = build(name, root / name)
        return made[name]

    return folder


@pytest.fixture(params=list(BUILDERS))
def vlm(request, bases):
    return bases(request.param)


def rows_for(folder, images):
    """PaliGemma takes no row without an image."""
    known = ROWS[:3] if "paligemma" in str(folder) else ROWS
    return [parse_conversation(row, images, f"row {number}") for number, row in enumerate(known, 1)]


def write_data(folder, images, file):
    import json

    file.write_text(json.dumps(ROWS[:3] if "paligemma" in str(folder) else ROWS))
    return file


def a_config(folder, images, tmp_path, **more):
    settings = {"steps": 2, "batch_size": 2, "rank": 4, "alpha": 4.0, "learning_rate": 0.02, "workers": 0, "threads": 1}
    settings |= {"preview_rows": 2, "preview_tokens": 3, "preview_every": 2}
    data = write_data(folder, images, tmp_path / "data.json")
    return InstructConfig(base=str(folder), data=data, images=images, out=tmp_path / "run", **(settings | more))


def test_labels_of_two_ways_agree(vlm, images):
    """With one, two and no images, several exchanges, and a system message."""
    chat = VisionLanguageModel(resolve_vision_base(str(vlm))).chat
    for row in rows_for(vlm, images):
        tokens = chat.verify_labels(row, load_images(row))
        said = chat.tokenizer.decode([label for label in tokens.labels if label != IGNORE], skip_special_tokens=True)
        for message in row.messages:
            for part in message["content"]:
                if message["role"] == "assistant":
                    assert "".join(part["text"].split()) in "".join(said.split())


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl"])
def test_the_processors_own_mask_agrees(bases, images, name):
    """Where a template marks what is generated, transformers finds the same tokens (from 5.20 on; before, none at all)."""
    folder = bases(name)
    chat = VisionLanguageModel(str(folder)).chat
    for row in rows_for(folder, images):
        shown, messages = iter(load_images(row)), []
        for message in row.messages:
            parts = [{"type": "image", "image": next(shown)} if p["type"] == "image" else p for p in message["content"]]
            messages.append({"role": message["role"], "content": parts})
        theirs = chat.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = chat.labels_by_marks(row, [image.size for image in load_images(row)])
        assert list(theirs["input_ids"][0]) == ours.ids
        assert list(theirs["assistant_masks"][0]) == [int(label != IGNORE) for label in ours.labels]


def test_a_batch_is_its_rows(vlm, images):
    """Losses of rows in one padded batch are those of each row alone, and weigh as asked."""
    vision = VisionLanguageModel(resolve_vision_base(str(vlm)))
    module, rows = AnswerLoss(vision.model).eval(), rows_for(vlm, images)
    weight = {"weight": torch.tensor(0.5)}
    with torch.no_grad():
        together = module(vision.chat.collate(rows, [load_images(row) for row in rows]) | weight)
        alone = [module(vision.chat.collate([row], [load_images(row)]) | weight) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_models_own(vlm, images):
    """One row: the summed cross-entropy over its learned tokens is transformers' mean times their number."""
    vision = VisionLanguageModel(resolve_vision_base(str(vlm)))
    row = rows_for(vlm, images)[1]
    batch = vision.chat.collate([row], [load_images(row)])
    learned = int((batch["labels"] != IGNORE).sum())
    with torch.no_grad():
        ours = AnswerLoss(vision.model).eval()(batch | {"weight": torch.ones(())})
        theirs = vision.model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item() * learned, rel=1e-4)


def test_packed_rows_do_not_see_one_another(vlm, images, tmp_path):
    """The losses of rows end to end in one sequence are those of a padded batch, and so are the gradients."""
    vision, rows = VisionLanguageModel(resolve_vision_base(str(vlm))), rows_for(vlm, images)
    if not vision.family.supports_packing:
        with pytest.raises(UserError, match="packing"):
            train(a_config(vlm, images, tmp_path, packing=True))
        return
    batch = vision.chat.collate(rows, [load_images(row) for row in rows]) | {"weight": torch.ones(())}
    layer = vision.model.get_submodule(vision.linear_layers(("language-attention",))[0]).requires_grad_(True)
    found = []
    for packing in (False, True):
        layer.zero_grad()
        losses = AnswerLoss(vision.model, packing=packing).eval()(dict(batch))
        losses.sum().backward()
        found.append((losses.detach(), layer.weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-2, atol=1e-4)


def test_answers_do_not_see_themselves(vlm, images):
    """Changing a learned token changes nothing that is predicted at or before it."""
    vision = VisionLanguageModel(resolve_vision_base(str(vlm)))
    row = rows_for(vlm, images)[0]
    batch = vision.chat.collate([row], [load_images(row)])
    labels = batch.pop("labels")
    at = int((labels[0] != IGNORE).nonzero()[1])
    with torch.no_grad():
        before = vision.model(**batch).logits
        batch["input_ids"][0, at] = (batch["input_ids"][0, at] + 1) % 200
        after = vision.model(**batch).logits
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=1e-4, atol=1e-5)
    assert (before[:, at:] - after[:, at:]).abs().max() > 1e-5


IN_TURN = [adapter for adapter in ADAPTERS if adapter != "moslora"]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        pytest.param(
            name,
            adapter,
            marks=() if adapter in ("moslora", IN_TURN[number % len(IN_TURN)]) else pytest.mark.campaign,
        )
        for number, name in enumerate(BUILDERS)
        for adapter in ADAPTERS
    ],
)
def test_trains_and_is_used(bases, images, tmp_path, name, adapter):
    """Two steps; the saved adapter, by stock PEFT and by us, says what the trained model says, merged or not.

    MoSLoRA in every family, the others in turn.
    """
    vlm = bases(name)
    run = train(a_config(vlm, images, tmp_path, adapter=adapter))
    vision = open_chat(str(vlm), [run.adapter])
    row = rows_for(vlm, images)[0].until(1)
    inputs = question_inputs(vision, [row])
    stock = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32), str(run.adapter / "model")
    ).eval()
    with torch.no_grad():
        ours = vision.model(**inputs).logits
        with base_model_only(vision):
            plain = vision.model(**inputs).logits
        torch.testing.assert_close(stock(**inputs).logits, ours, rtol=1e-4, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-4
        torch.testing.assert_close(open_chat(str(vlm)).model(**inputs).logits, plain, rtol=0, atol=0)
        if adapter not in ("fvae", "loratrf"):  # these are not linear
            merged = stock.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, ours, rtol=1e-3, atol=1e-4)
    assert len(answers(vision, [row], max_new_tokens=3)) == 1
    assert len(list((tmp_path / "run" / "samples").glob("*.json"))) == 2


def test_resume_is_exact(vlm, images, tmp_path):
    """With tower, projector and language model adapted, dropout, checkpointing and previews on the way."""
    parts = ("language-attention", "vision-attention")
    more = {"steps": 4, "checkpoint_every": 2, "target_parts": parts, "dropout": 0.1, "gradient_checkpointing": True}
    config = a_config(vlm, images, tmp_path, train_projector=True, projector_learning_rate=1e-3, **more)
    whole, part = train(config), train_until(replace(config, out=tmp_path / "b"), 2)
    resume(part.folder)
    files = [run.adapter / "model" / "adapter_model.safetensors" for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapters_stand_where_they_were_asked_for(vlm, images, tmp_path):
    """Each part's layers are its own, and none gets an adapter that learns nothing."""
    vision = VisionLanguageModel(resolve_vision_base(str(vlm)))
    parts = [part for part in PARTS if not ("gemma3" in str(vlm) and part == "projector")]
    seen = [set(vision.linear_layers((part,))) for part in parts]
    assert all(seen)
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert vision.projectors()
    run = train(a_config(vlm, images, tmp_path, target_parts=("vision-attention", "vision-mlp"), steps=1))
    tuned = open_chat(str(vlm), [run.adapter])
    names = set(adapter_layers(tuned.model))
    assert names <= set().union(*seen[2:4])
    if vision.config.get("vision_feature_layer") == -2:
        last = [name for name in seen[2] if ".layers.1." in name]
        assert last
        assert not names & set(last)


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_exports_are_proven(vlm, images, tmp_path, format):
    run = train(a_config(vlm, images, tmp_path, train_projector=True))
    proof = export_chat(run.adapter, str(vlm), format, tmp_path / "export")
    assert proof.difference < 1e-5
    assert proof.effect > 1e-4


def test_a_projector_of_several_adapters_is_refused(bases, images, tmp_path):
    run = train(a_config(bases("llava"), images, tmp_path, train_projector=True))
    with pytest.raises(UserError, match="only one"):
        open_chat(str(bases("llava")), [run.adapter, run.adapter])


def test_strength_goes_from_base_to_trained(bases, images, tmp_path):
    """The projector that was trained in full, too."""
    folder = bases("llava")
    run = train(a_config(folder, images, tmp_path, train_projector=True, learning_rate=0.05))
    row = rows_for(folder, images)[0].until(1)
    logits = {}
    for strength in (0.0, 0.5, 1.0):
        vision = open_chat(str(folder), [run.adapter], [strength])
        with torch.no_grad():
            logits[strength] = vision.model(**question_inputs(vision, [row])).logits
    with torch.no_grad():
        plain = open_chat(str(folder)).model(**question_inputs(vision, [row])).logits
        with base_model_only(vision):
            torch.testing.assert_close(vision.model(**question_inputs(vision, [row])).logits, plain, rtol=0, atol=0)
    torch.testing.assert_close(logits[0.0], plain, rtol=1e-5, atol=1e-6)
    distance = [(logits[s] - plain).norm() for s in (0.5, 1.0)]
    assert 0 < distance[0] < distance[1]


def test_every_family_is_tried(bases):
    tried = {VisionLanguageModel(str(bases(name))).config["model_type"] for name in BUILDERS}
    assert tried == {kind for family in FAMILIES for kind in family.model_types}
