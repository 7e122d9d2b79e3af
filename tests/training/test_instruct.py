"""Visual instruction tuning: which rows when, how they weigh, what is refused, the commands, the search, TRL."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import run_in_two_processes
from PIL import Image
from safetensors.torch import load_file
from short_runs import train_until, write_config
from tiny_vlms import build

from rankfold import MosLoraConfig
from rankfold.apps.cli import main
from rankfold.pipelines.chat import open_chat, option_scores, stream
from rankfold.toolkit.adapters.attach import adapter_layers
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.core.run_folder import Run
from rankfold.toolkit.data.conversations import read_conversations
from rankfold.toolkit.vlm.chat_tokens import IGNORE
from rankfold.toolkit.vlm.model import VisionLanguageModel
from rankfold.training.config.instruct import InstructConfig
from rankfold.training.config.search import InstructSearchConfig
from rankfold.training.config.yaml_file import from_yaml
from rankfold.training.instruct.conversations import Sampler, epoch_batches, hold_out, plan_rows
from rankfold.training.instruct.measuring import load_series
from rankfold.training.instruct.prepare import prepare_instruct
from rankfold.training.instruct.task import InstructTask
from rankfold.training.launch.plan_instruct import plan_instruct
from rankfold.training.launch.start import preflight, resume, train

COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return build("qwen2-vl", tmp_path_factory.mktemp("vlm") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve rows: plain colours, with one or two exchanges, and one row without an image."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(11):
        name = COLOURS[number % 3]
        Image.new("RGB", (32, 32 + 8 * (number % 2)), name).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": name}]
        if number % 4 == 0:
            turns += [{"from": "human", "value": "Say it again, louder."}, {"from": "gpt", "value": f"{name}! " * 4}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    rows.append({"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture
def config(base, data, tmp_path):
    return InstructConfig(
        base=str(base), data=data, out=tmp_path / "run", steps=4, batch_size=4, rank=4, alpha=4.0, learning_rate=0.02,
        log_every=1, checkpoint_every=2, preview_every=0, workers=0, threads=1, precision="fp32", gradient_checkpointing=False,
    )  # fmt: skip


def task_of(config):
    config, inputs = prepare_instruct(config)
    return InstructTask(config, *inputs, Accelerator(cpu=True))


# ---------------------------------------------------------------------------------------------- which rows when


def order_of(lengths, data, replayed=0, batch=4, grouped=True, seed=3):
    return Sampler(tuple(lengths), data, replayed, batch, grouped, seed)


def test_every_row_comes_once_a_pass():
    order = order_of(range(16), 16)
    for epoch in range(3):
        rows = [row for number in range(4) for row in order.rows(4 * epoch + number)]
        assert sorted(rows) == list(range(16))
    assert epoch_batches(order, 0) != epoch_batches(order, 1)
    assert order.rows(5) == order_of(range(16), 16).rows(5)


def test_batches_are_always_full():
    order = order_of(range(10), 10)
    assert order.batches_per_epoch == 3
    assert all(len(order.rows(number)) == 4 for number in range(9))
    assert {row for number in range(3) for row in order.rows(number)} == set(range(10))


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 1000, 400).tolist()

    def padding(order):
        batches = epoch_batches(order, 0)
        return sum(max(lengths[r] for r in b) * len(b) for b in batches) / sum(lengths)

    assert padding(order_of(lengths, 400, batch=8)) < 1.05
    assert padding(order_of(lengths, 400, batch=8, grouped=False)) > 1.5


def test_replay_takes_its_share_and_other_rows_each_pass():
    order = order_of([1] * 50, 12, replayed=4)
    passes = [sorted(row for batch in epoch_batches(order, epoch) for row in batch) for epoch in range(3)]
    for rows in passes:
        assert rows[:12] == list(range(12))
        assert len(rows) == 16
    old = [row for rows in passes for row in rows[12:]]
    assert len(set(old)) == 12
    assert min(old) >= 12


# ---------------------------------------------------------------------------------------------- how they weigh


def test_more_data_take_their_shares():
    """Three data sets: each pass takes twice the second's rows and half of the third's, other ones next time."""
    sampler = Sampler((5,) * 34, 10, 0, 4, False, 3, more=((4, 8), (20, 10)))
    passes = [[row for batch in epoch_batches(sampler, epoch) for row in batch] for epoch in range(2)]
    for rows in passes:
        counts = [rows.count(number) for number in range(34)]
        assert len(rows) == 28
        assert counts[:10] == [1] * 10
        assert counts[10:14] == [2] * 4
        assert sum(counts[14:]) == 10
    assert {row for rows in passes for row in rows if row >= 14} == set(range(14, 34))


def test_parts_have_their_rates_and_frozen_layers_none(config):
    settings = {
        "adapter": "lora",
        "target_parts": ("language-attention", "vision-attention", "projector"),
        "learning_rate": 1e-3,
    }
    rates = {"vision_learning_rate": 1e-4, "projector_learning_rate": 5e-4, "freeze": ("k_proj", "layers.0")}
    task = task_of(replace(config, **settings, **rates))
    names = {id(parameter): name for name, parameter in task.training.vision.model.named_parameters()}
    for group in task.parameter_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            wanted = 5e-4 if "merger" in name else 1e-4 if "visual" in name else 1e-3
            assert group["lr"] == pytest.approx(wanted), name
            assert "k_proj" not in name
            assert "language_model.layers.0." not in name
    with pytest.raises(UserError, match="--freeze nothing: none of the layers"):
        task_of(replace(config, freeze=("nothing",)))
    with pytest.raises(UserError, match="--vision-learning-rate is of a part that is not trained"):
        task_of(replace(config, vision_learning_rate=1e-4))


def test_a_training_goes_on_from_an_adapter(config, data, tmp_path):
    """Of a run or of an export, whose alpha is its rank; with further data beside."""
    first = train(replace(config, adapter="lora"))
    state = load_file(first.adapter / "model" / "adapter_model.safetensors")
    task = task_of(replace(config, adapter="lora", start_from=first.folder, more_data=(f"{data}=0.5",)))
    assert task.training.sampler.rows_per_epoch == 18
    task.save_adapter(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)
    with pytest.raises(UserError, match=r"lora_alpha 4.0, this run 8.0"):
        task_of(replace(config, adapter="lora", alpha=8.0, start_from=first.folder))
    with pytest.raises(UserError, match="kind LORA"):
        task_of(replace(config, adapter="moslora", start_from=first.folder))


def test_every_learned_token_counts_alike(config):
    """Two forward passes of four rows make the step of one of eight: the mean over all learned tokens of the window."""
    found = {}
    for batch, accumulation in ((8, 1), (4, 2)):
        task = task_of(replace(config, batch_size=batch, gradient_accumulation=accumulation, group_by_length=False))
        losses = []
        for part in range(accumulation):
            inputs = task.batch(part * batch, list(range(batch)))
            losses.append(task.module(inputs).mean() / accumulation)
        found[batch] = sum(losses)
        learned = total = 0.0
        with torch.no_grad():
            for part in range(accumulation):
                rows = [task.training.rows[n] for n in task.training.sampler.rows(part)]
                from rankfold.training.instruct.conversations import load_images

                for row in rows:
                    one = task.training.vision.chat.collate([row], [load_images(row)])
                    count = int((one["labels"] != IGNORE).sum())
                    total += float(task.training.vision.model(**one).loss) * count
                    learned += count
        assert float(found[batch]) == pytest.approx(total / learned, rel=1e-4)
    assert float(found[8]) == pytest.approx(float(found[4]), rel=1e-4)


def test_workers_change_nothing(config, tmp_path):
    runs = [train(replace(config, workers=n, out=tmp_path / str(n), dropout=0.2)) for n in (0, 2)]
    assert [r["loss"] for r in runs[0].metrics()] == [r["loss"] for r in runs[1].metrics()]


def test_resume_goes_on_in_the_middle_of_a_pass(config, tmp_path):
    """With replay, length groups, dropout and a projector trained in full."""
    config = replace(config, steps=7, replay=config.data, dropout=0.1, train_projector=True, batch_size=2)
    whole, part = train(config), train_until(replace(config, out=tmp_path / "b"), 3)
    resume(part.folder)
    files = [run.adapter / "model" / "adapter_model.safetensors" for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [r["loss"] for r in whole.metrics()] == [r["loss"] for r in Run(tmp_path / "b").metrics()]


def test_the_best_step_is_kept(config, tmp_path):
    """Held-out rows are not trained on, and a resume gives the same measurements."""
    measured = replace(config, steps=6, evaluate_every=2, keep="best", evaluate_answers=4, max_left_out=1.0)
    run = train(measured)
    base, *steps = load_series(run)
    assert [one.step for one in (base, *steps)] == [0, 2, 4, 6]
    assert len(base.losses) == 1
    assert min(sum(one.losses) for one in steps) < sum(base.losses)
    choice = json.loads((run.folder / "choice.json").read_text())
    kept = run.folder / "measured" / f"{choice['step']:06d}" / "model" / "adapter_model.safetensors"
    assert (run.adapter / "model" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    data = json.loads((run.folder / "data.json").read_text())["items"]
    [place] = [name for name in data if name.startswith("measured by: ")]
    assert place.removeprefix("measured by: ") not in data
    again = train_until(replace(measured, out=tmp_path / "again"), 3)
    resume(again.folder)
    assert load_series(again) == load_series(run)


def test_rows_of_one_image_are_held_out_together(config):
    planned = plan_rows(config.data, config, VisionLanguageModel(config.base).chat)
    for row in planned.rows[:6]:
        object.__setattr__(row, "images", planned.rows[0].images)
    kept, out = hold_out(planned, 0)
    assert len(kept) + len(out) == len(planned)
    images = [{image for row in side.rows for image in row.images} for side in (kept, out)]
    assert not images[0] & images[1]


def test_two_processes_give_the_same_curve(config, tmp_path):
    """Also where a process's rows have no image, so that the tower has no gradient there, and where the base is sharded."""
    tower = {"target_parts": ("language-attention", "vision-attention"), "train_projector": True}
    more = {"plain": {}, "tower": tower, "shared": tower | {"preview_every": 2, "preview_tokens": 4}}
    ones = {name: train(replace(config, **own, out=tmp_path / name)) for name, own in more.items()}
    files = []
    for name, own in more.items():
        two = replace(config, **own, out=tmp_path / f"{name}-two", shard_base=name == "shared")
        files.append(write_config(two, tmp_path / f"{name}.yaml"))
    run_in_two_processes(tmp_path, *(["train", "instruct", "--config", str(file)] for file in files))
    for name, one in ones.items():
        two = Run(tmp_path / f"{name}-two")
        assert two.status()["processes"] == 2
        for a, b in zip(one.metrics(), two.metrics(), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3), name
        previews = [[file.read_text(encoding="utf-8") for file in sorted(run.samples.iterdir())] for run in (one, two)]
        assert previews[0] == previews[1]


def test_a_shared_base_is_not_compiled(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="does not go with --compile yet"):
        preflight(replace(config, shard_base=True, compile=True))


def test_a_quantised_base_learns(config):
    pytest.importorskip("bitsandbytes")
    run = train(replace(config, quantize="nf4", precision="bf16"))
    assert all(np.isfinite(row["loss"]) for row in run.metrics())
    assert all(row["samples_per_second"] > 0 for row in run.metrics())
    assert " samples/s  " in run.log_file.read_text(encoding="utf-8")


def test_a_loss_that_is_not_finite_stops(config):
    with pytest.raises(UserError, match="not finite"):
        train(replace(config, learning_rate=1e30, steps=20, max_grad_norm=0))


def test_epochs_are_steps(config):
    assert preflight(replace(config, epochs=2))[0].steps == 6
    assert preflight(replace(config, epochs=2, gradient_accumulation=2))[0].steps == 3


# ---------------------------------------------------------------------------------------------- what is kept and what is refused


def test_the_adapter_carries_its_data(config, data):
    facts = json.loads((train(config).adapter / "rankfold.json").read_text(encoding="utf-8"))
    (certificate,) = facts["data"]
    assert certificate["rows"] == 12
    assert certificate["images"] == 11
    assert certificate["labels_verified_in_two_ways"] >= 8
    assert len(certificate["sha256"]) == len(certificate["template_sha256"]) == 64
    assert facts["kind"] == "qwen2_vl"


def test_long_rows_are_left_out_or_truncated(config):
    chat = VisionLanguageModel(config.base).chat
    whole = plan_rows(config.data, config, chat)
    limit = sorted(whole.lengths)[-4]
    short = plan_rows(config.data, replace(config, max_length=limit), chat)
    assert len(short) == 9
    assert len(short.too_long) == 3
    assert max(short.lengths) <= limit
    kept = plan_rows(config.data, replace(config, max_length=limit, truncate=True), chat)
    assert len(kept) == 12
    assert kept.truncated == 3
    assert max(kept.lengths) <= limit
    assert len(kept.rows[0].messages) == 2
    with pytest.raises(UserError, match="longer than --max-length"):
        preflight(replace(config, max_length=16))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is <|im_end|>?", "control token"),
        ("Look at <|image_pad|>", "the mark <|image_pad|>, of which there are 1 for 0 images"),
        ("\ue000", "private"),
    ],
)
def test_control_tokens_in_texts_are_refused(config, tmp_path, text, words):
    rows = [{"question": "Fine?", "answer": "yes"}, {"question": text, "answer": "no"}]
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=words) as error:
        preflight(replace(config, data=file))
    assert "row 2" in str(error.value)
    assert len(plan_rows(file, replace(config, skip_bad=True), VisionLanguageModel(config.base).chat)) == 1


def test_a_image_that_breaks_off_stops_with_its_row(config, tmp_path):
    Image.effect_noise((64, 64), 80).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [{"image": "cut.png", "question": "What?", "answer": "red"}]
    (tmp_path / "cut.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"cut\.json, row 1: .*not a valid image"):
        train(replace(config, data=tmp_path / "cut.json"))


def copy_with_template(base, folder, change):
    """A copy of the base's processor files with another template."""
    import shutil

    shutil.copytree(base, folder)
    file = folder / "chat_template.jinja"
    text = change(file.read_text(encoding="utf-8"))
    file.unlink()
    if text is not None:
        file.write_text(text)
    return folder


def test_a_base_without_a_template_needs_one(config, base, tmp_path):
    folder = copy_with_template(base, tmp_path / "bare", lambda text: None)
    with pytest.raises(UserError, match=r"no chat template.*--chat-template"):
        preflight(replace(config, base=str(folder)))
    own = tmp_path / "own.jinja"
    own.write_text((base / "chat_template.jinja").read_text(encoding="utf-8"))
    run = train(replace(config, base=str(folder), chat_template=own))
    assert (run.adapter / "chat_template.jinja").read_text(encoding="utf-8") == own.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace("assistant", "assistant\n<think>", 1) if False else "{{ 'x' }}",
            "leaves answers out",
        ),
        (lambda text: text + "{% if add_generation_prompt %}<plan>{% endif %}", "asks for an answer with"),
    ],
)
def test_templates_that_teach_something_else_are_refused(config, base, tmp_path, change, words):
    folder = copy_with_template(base, tmp_path / "bent", change)
    with pytest.raises(UserError, match=words):
        preflight(replace(config, base=str(folder)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, "--data is missing"),
        ({"base": "nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"base": "tiny-vml"}, "tiny-vlm"),
        ({"adapter": "moslore"}, "moslora"),
        ({"target_modules": ("nothing",)}, "matches no layer"),
        ({"train_projector": True, "target_parts": ("projector",)}, "leave one of them out"),
        ({"replay_share": 1.0}, "--replay-share"),
        ({"epochs": 0.0}, "--epochs"),
    ],
)
def test_mistakes_are_one_sentence(config, change, words):
    with pytest.raises(UserError, match=words):
        train(replace(config, **change))


def test_a_processor_that_lacks_a_library_says_which(config, tmp_path, monkeypatch):
    """As on a machine without num2words, which SmolVLM's processor needs."""
    from transformers.models.smolvlm import processing_smolvlm

    folder = build("smolvlm", tmp_path / "base")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(UserError, match=r"needs a library that is not installed: .*num2words"):
        preflight(replace(config, base=str(folder)))


def test_a_diffusion_pipeline_is_sent_elsewhere(config, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="train subject"):
        preflight(replace(config, base=str(tmp_path)))


# ---------------------------------------------------------------------------------------------- the commands


def test_inspect_shows_what_is_learned(config, data, capsys):
    main(["inspect", str(data), "--base", config.base, "--rows", "1"])
    said = capsys.readouterr().out
    assert "rows     12, with 11 images" in said
    assert "found in two ways, which agree" in said
    assert "«red<|im_end|>»" in said
    assert "What colour?" in said.split("row 1")[1]


def test_a_plan_counts_what_training_trains(config, capsys):
    """The parameters that training has, the rows that it sees, and no weight loaded."""
    plan = plan_instruct(replace(config, train_projector=True, epochs=2.0))
    task = task_of(replace(config, train_projector=True, epochs=2.0))
    assert plan.parameters == sum(p.numel() for group in task.parameter_groups() for p in group["params"])
    assert plan.config.steps == task.config.steps == 6
    assert plan.base == sum(p.numel() for p in VisionLanguageModel(config.base).model.parameters()) * 4
    main(["plan", "instruct", "--base", config.base, "--data", str(config.data), "--steps", "3"])
    said = capsys.readouterr().out
    assert "rows     12, with 11 images" in said
    assert "passes over 12 rows" in said


def test_a_run_is_asked_and_evaluated(config, data, tmp_path, capsys):
    run = train(config)
    questions = [
        {"image": f"{n}.png", "question": "What colour?", "answer": COLOURS[n % 3], "split": "even" if n % 2 else "odd"}
        for n in range(6)
    ]
    questions += [{"image": "0.png", "question": "Is it red?", "answer": "yes"}]
    questions += [{"image": "1.png", "question": "Which?", "choices": ["red", "blue"], "answer": "blue"}]
    file = data.parent / "test.json"
    file.write_text(json.dumps(questions))
    more = ["--retention", str(file), "--max-new-tokens", "4", "--vlmevalkit"]
    words = ["evaluate", "instruct", "--run", str(run.folder), "--data", str(file), *more]
    main(words)
    said = capsys.readouterr().out
    figures = json.loads((run.folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["leaked"] == 8
    assert figures["compared"]["verdict"] in said
    assert figures["settings"]["rows"] == 8
    assert set(figures["controls"]) == {"blank image", "another row's image", "commonest answer"}
    assert figures["tuned"]["by_likelihood"]["rows"] == 2
    assert "unparsed" in said
    assert (run.folder / "evaluation" / "test.tsv").is_file()
    run_in_two_processes(tmp_path, [*words, "--out", str(tmp_path / "two")])
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text(encoding="utf-8")) == figures
    main(["chat", "--run", str(run.folder), "--image", str(data.parent / "0.png"), "--compare", "What", "colour?"])
    assert {"base:  ", "tuned: "} <= {line[:7] for line in capsys.readouterr().out.splitlines()}


def test_a_image_run_is_no_chat(tmp_path):
    (tmp_path / "config.yaml").write_text("method: subject\n")
    with pytest.raises(SystemExit):
        main(["chat", "--run", str(tmp_path), "Hello?"])


def test_streaming_says_what_answers_say_and_raises_what_fails(config, data):
    vision = VisionLanguageModel(config.base)
    row = read_conversations(data).rows[0].until(1)
    whole = "".join(stream(vision, row, max_new_tokens=4))
    from rankfold.pipelines.chat import answers

    assert answers(vision, [row], max_new_tokens=4) == [whole.strip()]
    vision.model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(stream(vision, row))


def test_options_score_what_the_model_says_of_them(config, data):
    """The scores are the model's own log-likelihoods of the option and its end, each computed alone."""
    vision = VisionLanguageModel(config.base)
    row = read_conversations(data).rows[1]
    scores = option_scores(vision, row.until(1), ["blue", "red and green"])
    from rankfold.training.instruct.conversations import load_images

    batch = vision.chat.collate([row], [load_images(row)])
    learned = int((batch["labels"] != IGNORE).sum())
    with torch.no_grad():
        assert scores[0] == pytest.approx(-float(vision.model(**batch).loss) * learned, rel=1e-4)


# ---------------------------------------------------------------------------------------------- search, TRL


def test_structures_are_searched(config, tmp_path):
    """The winner is an adapter that talks, and a config that trains; a search that is stopped goes on where it was."""
    search = InstructSearchConfig(
        base=config.base, data=config.data, out=tmp_path / "search", steps=3, batch_size=4, rank=2, learning_rate=0.01,
        target_parts=("language-attention",), generations=2, population=4, parents=2, workers=0, threads=1, preview_every=0,
    )  # fmt: skip
    run = train(search)
    from rankfold.pipelines.chat import open_chat

    assert run.status()["state"] == "done"
    assert (run.folder / "structure.txt").is_file()
    answers = run.candidates.read_bytes()
    vision = open_chat(config.base, [run.adapter])
    assert adapter_layers(vision.model)
    again = from_yaml(run.folder / "best.yaml")
    assert train(replace(again, steps=1)).status()["state"] == "done"
    run.candidates.write_bytes(b"".join(answers.splitlines(keepends=True)[:3]))
    resume(run.folder)
    assert run.candidates.read_bytes() == answers


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_what_no_format_can_say_is_said_so(config, capsys, format):
    """A GLoRA of full rank with a bias where the base has none: no format is named that would only refuse it again."""
    options = {"a": "vector", "b": "lora", "c": "none", "d": "none", "e": "vector"}
    run = train(replace(config, adapter="glora", adapter_options=options, target_modules=("o_proj",)))
    with pytest.raises(SystemExit):
        main(["export", str(run.folder), "--format", format])
    said = capsys.readouterr().err
    assert "It stays what it is" in said
    assert "use --format" not in said.lower()


def test_trl_trains_a_vision_language_model(base, data, tmp_path):
    """TRL's SFTTrainer takes our config on a model with images as it is, and saves what loads."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = []
    for row in read_conversations(data).rows[:8]:
        messages = [
            {"role": m["role"], "content": "".join(p.get("text", "") for p in m["content"])} for m in row.messages[:2]
        ]
        rows.append({"images": [Image.open(row.images[0])], "messages": messages})
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=2,
        max_length=None, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    targets = ["q_proj", "v_proj"]
    trainer = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(base),
        peft_config=MosLoraConfig(r=4, target_modules=targets),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter")
    ).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    inputs["mm_token_type_ids"] = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, trainer.model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_trl_learns_preferences_with_our_adapters(base, tmp_path):
    """DPO on images and answers, as docs/instruct.md shows it; what TRL saves is read by `chat`."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = [
        {
            "images": [Image.new("RGB", (32, 32), right)],
            "prompt": [{"role": "user", "content": "what is it"}],
            "chosen": [{"role": "assistant", "content": right}],
            "rejected": [{"role": "assistant", "content": wrong}],
        }
        for right, wrong in [("red", "blue"), ("blue", "red")] * 4
    ]
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=2,
        max_length=None, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(base),
        peft_config=MosLoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    tuned = open_chat(str(base), [tmp_path / "adapter"]).model
    assert any(float(p.abs().max()) > 0 for name, p in tuned.named_parameters() if "adapter_0" in name)
    assert len(adapter_layers(tuned)) == 4


# ---------------------------------------------------------------------------------------------- composition


def test_adapters_are_composed(config, data, tmp_path, capsys):
    """By fixed weights the logits are those of both adapters at these strengths; learned weights are an adapter, too."""
    from rankfold.pipelines.chat import open_chat, question_inputs

    runs = [
        train(replace(config, out=tmp_path / str(n), seed=n, adapter=kind)) for n, kind in ((1, "lora"), (2, "moslora"))
    ]
    folders = [str(run.folder) for run in runs]
    main(
        [
            "compose",
            "instruct",
            *folders,
            "--weights",
            "0.7",
            "0.4",
            "--base",
            config.base,
            "--out",
            str(tmp_path / "sum"),
        ]
    )
    asked = [read_conversations(data).rows[0].until(1)]
    both = open_chat(config.base, [run.adapter for run in runs], [0.7, 0.4])
    whole = open_chat(config.base, [tmp_path / "sum" / "adapter"])
    with torch.no_grad():
        logits = [vision.model(**question_inputs(vision, asked)).logits for vision in (both, whole)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    more = ["--data", str(data), "--steps", "3", "--batch-size", "4", "--workers", "0", "--preview-every", "0"]
    main(["compose", "instruct", *folders, "--base", config.base, "--out", str(tmp_path / "learned"), *more])
    assert "Learning" in capsys.readouterr().out
    facts = json.loads((tmp_path / "learned" / "adapter" / "rankfold.json").read_text(encoding="utf-8"))
    weights = torch.tensor(list(facts["composed_weights"].values()))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)), rtol=0, atol=1e-4)
    assert weights.std() > 1e-4
    open_chat(config.base, [tmp_path / "learned" / "adapter"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--weights", "1"], "holds 1 numbers for 2"),
        (["--weights", "1", "1", "--data", "DATA"], "leave --weights and --merge out"),
        (["--base", "tiny-vlm"], "was trained on"),
    ],
)
def test_compositions_that_cannot_be(config, data, tmp_path, capsys, more, words):
    run = train(replace(config, steps=1))
    more = [str(data) if word == "DATA" else word for word in more]
    base = [] if "--base" in more else ["--base", config.base]
    with pytest.raises(SystemExit):
        main(["compose", "instruct", str(run.folder), str(run.folder), *base, *more, "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err


def test_a_full_projector_is_not_composed(config, tmp_path, capsys):
    run = train(replace(config, steps=1, train_projector=True))
    with pytest.raises(SystemExit):
        main(["compose", "instruct", str(run.folder), "--base", config.base, "--out", str(tmp_path / "out")])
    assert "projector trained in full" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["llava-1.5-lora", "llava-llama-3-moslora"])
def test_shipped_recipes_train(name, data, tmp_path):
    """As they are, but for the size: on a tiny LLaVA, one step."""
    from rankfold.apps.cli.train_instruct import parse_config

    config, _ = parse_config("instruct", ["--config", name, "--data", str(data)], "train instruct")
    assert config.learning_rate == 2e-4
    assert config.train_projector
    base = build("llava", tmp_path / "base")
    run = train(
        replace(
            config,
            base=str(base),
            out=tmp_path / "run",
            epochs=None,
            steps=1,
            batch_size=2,
            gradient_accumulation=2,
            rank=4,
            workers=0,
            precision="fp32",
            preview_every=0,
        )
    )
    facts = json.loads((run.adapter / "rankfold.json").read_text(encoding="utf-8"))
    assert facts["pad_to_square"]
    saved = json.loads((run.adapter / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert any("language_model" in target for target in saved["target_modules"])
    assert (config.vision_alpha is None) == (not saved["alpha_pattern"])


def test_a_config_of_another_method_is_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("method: subject\n")
    with pytest.raises(SystemExit):
        main(["train", "instruct", "--config", str(tmp_path / "other.yaml")])


def test_the_towers_alpha_is_its_own(tmp_path, data):
    base = build("llava", tmp_path / "base")
    config = InstructConfig(
        base=str(base), data=data, out=tmp_path / "run", batch_size=2, rank=4, alpha=8.0, vision_alpha=2.0, workers=0,
        target_parts=("language-attention", "vision-attention"), adapter="moslora", precision="fp32",
    )  # fmt: skip
    task = task_of(config)
    layers = adapter_layers(task.training.vision.model)
    assert {layer.alpha["default"] for name, layer in layers.items() if "vision_tower" in name} == {2.0}
    assert {layer.alpha["default"] for name, layer in layers.items() if "language_model" in name} == {8.0}


def test_a_frame_keeps_what_a_processor_would_crop(tmp_path):
    """LLaVA-1.5's processor crops the middle square: what is at the edges is seen only within a frame."""
    base = build("llava", tmp_path / "base")
    pixels = []
    for edge in ("red", "blue"):
        image = Image.new("RGB", (90, 30), "white")
        image.paste(Image.new("RGB", (8, 30), edge), (0, 0))
        for framed in (False, True):
            chat = VisionLanguageModel(str(base), pad_to_square=framed).chat
            text = chat.template.render(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
            )
            pixels.append(chat.processor_inputs([text], [[image]], padding_side="right")["pixel_values"])
    assert torch.equal(pixels[0], pixels[2])
    assert (pixels[1] - pixels[3]).abs().max() > 0.5


def test_exports_when_done(config):
    run = train(replace(config, steps=1, export=("peft", "merged")))
    assert run.status()["exports"] == {"peft": "export/peft", "merged": "export/merged"}
    with pytest.raises(UserError, match="vLLM serves LoRA on the language model alone"):
        preflight(replace(config, target_parts=("language-attention", "vision-attention"), export=("vllm",)))
    with pytest.raises(UserError, match="--export kohya is not one of a vision-language model"):
        preflight(replace(config, export=("kohya",)))
