"""Reading answers, counting them, and the questions that are asked: against values found by hand."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.data.choices import LETTER_INSTRUCTION
from rankfold.toolkit.data.conversations import read_conversations
from rankfold.toolkit.data.images import load_rgb
from rankfold.toolkit.data.videos import medium_bytes
from rankfold.toolkit.metrics import answers as scoring
from rankfold.toolkit.metrics import statistics
from rankfold.training.evaluation import instruct as evaluate
from rankfold.training.evaluation import instruct_report as evaluation_report
from rankfold.training.evaluation import items as module
from rankfold.training.evaluation.lmms_eval import write_lmms_eval

DOGS = ("a cat", "a dog")


@pytest.fixture
def items(tmp_path):
    """Makes items of rows; without more to say, a row shows a.png and asks 'What?'. There are five images, a.png to e.png."""
    for n, name in enumerate("abcde"):
        Image.new("RGB", (8, 6), (40 * n, 0, 0)).save(tmp_path / f"{name}.png")

    def make(*rows, **options):
        (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "question": "What?"} | row for row in rows]))
        return module.read_items(tmp_path / "data.json", None, **options)

    return make


def words(item):
    """The text that is put to the model."""
    return "\n".join(part["text"] for part in item.conversation.messages[-1]["content"] if part["type"] == "text")


def make_answers(items, *texts):
    """What a model would be noted for that gave these answers."""
    read = [item.parse_answer(text) for item, text in zip(items, texts, strict=True)]
    scores = [item.score(said) for item, said in zip(items, read, strict=True)]
    return evaluate.ModelAnswers(list(texts), read, scores, [None] * len(items))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes.", "yes"), ("no", "no"), ("YES!", "yes"), (" Yes, it is.\nNo doubt.", "yes"), ("No, there is none", "no"),
        ("**No**", "no"), ("Answer: yes", "yes"), ("yes and no", None), ("yes-no", None), ("not sure", None), ("I know", None),
        ("nowhere, yesterday", None), ("", None),
    ],
)  # fmt: skip
def test_yes_or_no(text, said):
    assert scoring.read_yesno(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"), (" B\n", "B"), ("B.", "B"), ("(B)", "B"), ("B. a dog", "B"), ("B: a dog", "B"), ("(B) a dog", "B"), ("B) a dog", "B"),
        ("The answer is B", "B"), ("the answer is (B).", "B"), ("Answer: B", "B"), ("a dog", "B"), ("A dog.", "B"), ("a cat", "A"),
        ("C", None), ("C. a bird", None), ("The answer is C", None), ("a bird", None), ("A or B", None), ("A and B", None), ("", None),
        ("The answer is A or B", None), ("A dog is here", None), ("A, B", None), ("A. or B.", None), ("A. a cat\nB. a dog", None),
    ],
)  # fmt: skip
def test_choices(text, said):
    """None also for several letters at once, and for the list of options said back: neither is an answer."""
    assert scoring.read_choice(text, DOGS) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("**B**", "B"), ("Option B", "B"), ("option (B).", "B"), ("The correct answer is B", "B"), ("**Answer:** B", "B"), ("b", "B"),
        ("\\boxed{B}", "B"), ("<think>\nA?\n</think>\n\nB", "B"), ("Option A or B", None), ("1", None),
    ],
)  # fmt: skip
def test_choices_as_chat_models_write_them(text, said):
    assert scoring.read_choice(text, DOGS) == said


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("-5", "5", 0), ("\u22125", "-5", 1), ("x > 3", "x < 3", 0), ("x+1", "x-1", 0), ("C++", "C#", 0), ("1,000", "1000", 1),
        ("3.5", "3 5", 0),
        ("3.50", "3.5", 1), ("+3", "3", 1), ("12,345.60", "12345.6", 1), ("1/2", "1 2", 0), ("3:45", "3 45", 0), ("50%", "50", 1),
        ("$5", "5", 1), ("**red**", "red", 1), ("covid-19", "covid 19", 1), ("1995.", "1995", 1), ("10-20", "10 20", 0),
        ("- red", "red", 1),
        ("a<b", "a b", 0), ("0", "-0", 1), ("<think>2</think>\n3", "3", 1), ("2,3", "23", 0),
    ],
)  # fmt: skip
def test_numbers_and_signs(said, right, score):
    assert scoring.vqa_score(said, [right]) == score


def test_a_list_mark_is_no_answer():
    assert (scoring.read_yesno("1. Yes"), scoring.read_yesno("- No, none.")) == ("yes", "no")


def test_answers_that_were_cut_are_no_sign_of_blindness(items):
    made = items({"answer": "yes"})
    own = figures(made, ["no"], ["no"], (0.0, 0.2))
    own["tuned"]["cut"] = own["controls"]["blank image"]["seen"]["cut"] = 1
    text = evaluation_report.format_report(own | {"settings": {"max_new_tokens": 32}})
    assert "tuned: 1 of 1 answers were cut at --max-new-tokens 32" in text
    assert "it cannot be told whether it looks" in text


def test_answers_as_indices_are_counted(tmp_path):
    (tmp_path / "x.json").write_text(
        json.dumps([{"question": "?", "choices": DOGS, "answer": 1}, {"question": "?", "answer": "x", "hint": "h"}])
    )
    found = module.read_item_file(tmp_path / "x.json", None)
    assert found.items[0].references == ("B",)
    assert "1 answers are numbers, read as the index of the right option, from 0" in found.describe()
    assert found.unused.describe() == "Not used: field 'hint' (1 row)."


def test_options_that_are_alike_are_not_told_apart():
    assert scoring.read_choice("dog", ["a dog", "The dog"]) is None


@pytest.mark.parametrize(
    ("text", "same"),
    [("Two dogs.", "2 dogs"), ("the  Cat!", "cat"), ("T-shirt", "t shirt"), ("it's", "it's"), ("an apple", "apple"), ("ten", "10")],
)  # fmt: skip
def test_answers_that_are_alike_become_alike(text, same):
    assert scoring.normalize_answer(text) == same
    assert scoring.normalize_answer(same) == same


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy(matches, score):
    """Of 10 answers, e.g. 2 matches: left out in 2 of 10 turns (1/3), both there in 8 (2/3); the mean is 0.6."""
    answers = ["The cat."] * matches + ["dog"] * (10 - matches)
    assert scoring.vqa_score("a cat", answers) == pytest.approx(score)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10])
def test_what_every_reference_says_is_right(count):
    assert scoring.vqa_score("cat", ["cat"] * count) == 1.0
    assert scoring.vqa_score("dog", ["cat"] * count) == 0.0


@pytest.mark.parametrize("answer", ["red", "A", "?", "3.5", "日本"])
def test_what_the_reference_says_is_right_and_readable(items, answer):
    """Also a letter on a sign that is an article elsewhere."""
    [item] = items({"answer": answer})
    assert item.score(item.parse_answer(answer)) == 1.0
    assert item.score(item.parse_answer("the")) == 0.0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 5, 0.0, 0.4345), (5, 5, 0.5655, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)],
)
def test_wilson(right, count, low, high):
    assert statistics.wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(10, 2, 2 * (1 + 12 + 66) / 2**12), (5, 0, 2 / 2**5), (3, 3, 1.0), (1, 0, 1.0), (0, 0, 1.0)],
)
def test_mcnemar(gained, lost, p):
    """The tail of a fair coin, by hand: 10 or more of 12 are 66 + 12 + 1 of 4096."""
    assert statistics.mcnemar_p(gained, lost) == statistics.mcnemar_p(lost, gained) == pytest.approx(p)


def test_what_repeats_within_a_cluster_is_not_more_evidence():
    """20 images with five questions each, all five right or all wrong: as sure as 20 rows, not as 100."""
    values, clusters = (
        [float(n % 2) for n in range(20) for _ in range(5)],
        [str(n) for n in range(20) for _ in range(5)],
    )
    low, high = statistics.cluster_interval(values, clusters)
    wide, narrow = statistics.wilson_interval(10, 20), statistics.wilson_interval(50, 100)
    assert high - low > 1.5 * (narrow[1] - narrow[0])
    assert (low, high) == pytest.approx(wide, abs=0.05)
    assert (low, high) == statistics.cluster_interval(values, clusters)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [([1.0] * 3, "abc"), ([0.0] * 3, "abc"), ([1.0] * 30, "abc" * 10), ([0.6] * 3, "abc"), ([0.6, 0.9], "aa")],
)
def test_three_rows_never_make_sure(values, clusters):
    own = statistics.mean_with_interval(values, clusters)
    assert own["mean"] == pytest.approx(sum(values) / len(values))
    assert own["high"] - own["low"] > 0.3


def test_share_is_wilsons_where_rows_are_independent():
    assert statistics.mean_with_interval([30.0] * 3, "abc")["high"] == 30  # decibels are no shares
    own = statistics.mean_with_interval([1.0] * 8 + [0.0] * 2, "abcdefghij")
    assert (own["low"], own["high"], own["mean"], own["rows"]) == (*statistics.wilson_interval(8, 10), 0.8, 10)


@pytest.mark.parametrize(
    ("gains", "clusters"),
    [
        ([0] * 30, range(30)), ([1, -1] * 15, range(30)), ([1] + [0] * 29, range(30)),
        ([1], "a"), ([1] * 3, "abc"), ([1, 1, 1, 0], "abcd"), ([1] * 5, "abcde"), ([1] * 10, "a" * 10),
    ],
)  # fmt: skip
def test_no_verdict_without_evidence(gains, clusters):
    """Neither after a handful of rows (a fair coin falls like this in more than 5 % of all cases), nor after one image."""
    clusters = [str(name) for name in clusters]
    assert statistics.verdict(gains, clusters)[0] == "no difference shown"
    assert statistics.verdict([-gain for gain in gains], clusters)[0] == "no difference shown"


def test_a_verdict_with_evidence():
    gains, clusters = [1] * 12 + [0] * 18, [str(n) for n in range(30)]
    word, low, high = statistics.verdict(gains, clusters)
    assert (word, low < 0.4 < high) == ("improved", True)
    assert statistics.verdict([-gain for gain in gains], clusters)[0] == "worse"


def test_yes_no_figures():
    """The rate of yes is that of what was said: 3 of 4, where 1 of 4 would be right."""
    right = {"precision": 1 / 3, "recall": 1, "f1": 0.5, "yes_rate": 0.75, "yes_rate_of_the_truth": 0.25}
    assert scoring.yes_no_metrics(["yes", "yes", "yes", None], ["yes", "no", "no", "no"]) == pytest.approx(right)
    assert scoring.yes_no_metrics([None], ["yes"])["f1"] == 0.0


def test_majority():
    right = ["no", "yes", "no"]
    assert scoring.majority_baseline(right, lambda said, n: float(said == right[n])) == ("no", pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("row", "kind", "references"),
    [
        ({"answer": "red"}, "vqa", ("red",)),
        ({"answers": ["red", "pink"]}, "vqa", ("red", "pink")),
        ({"answers": "red"}, "vqa", ("red",)),
        ({"answer": 3}, "vqa", ("3",)),
        ({"answer": "Yes"}, "yesno", ("yes",)),
        ({"answer": "Yes", "type": "vqa"}, "vqa", ("Yes",)),
        ({"answer": "a dog", "choices": DOGS}, "mcq", ("B",)),
        ({"answer": "b", "choices": DOGS}, "mcq", ("B",)),
        ({"answer": 7, "choices": [5, 7]}, "mcq", ("B",)),
    ],
)
def test_kinds_of_questions(items, row, kind, references):
    [item] = items(row)
    assert (item.kind, item.references) == (kind, references)
    assert len(item.conversation.messages) == 1
    assert words(item).startswith("What?")


def test_ten_answers_to_yes_or_no_count_together(items):
    """One person of ten says no: 'yes' has nine matches, 'no' has one."""
    [item] = items({"answers": ["no"] + ["yes"] * 9})
    assert item.score(item.parse_answer("Yes.")) == 1.0
    assert item.score(item.parse_answer("No.")) < 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the row has no answer"),
        ({"answers": []}, "the row has no answer"),
        ({"answer": " "}, "an answer is empty"),
        ({"answer": "x", "type": "essay"}, "the type 'essay' is none of vqa, yesno, mcq"),
        ({"answer": "maybe", "type": "yesno"}, "must be yes or no, not 'maybe'"),
        ({"answer": "a bird", "choices": DOGS}, "the answer 'a bird' is none of the choices"),
        ({"answer": "C", "choices": DOGS}, "the answer 'C' is none of the choices"),
        ({"answer": "A", "type": "mcq"}, "the answer 'A' is none of the choices"),
        ({"answer": "x", "image": "z.png"}, "there is no image"),
        ({"answer": "x1", "choices": [f"x{n}" for n in range(30)]}, "choices"),
        ({"answer": "x29", "choices": [f"x{n}" for n in range(30)]}, "choices"),
    ],
)
def test_questions_that_cannot_be_asked(items, row, message):
    """Also more choices than there are letters: a choice that is not shown cannot be chosen."""
    with pytest.raises(UserError) as error:
        items({"answer": "x"}, row)
    assert "data.json, row 2: " in str(error.value)
    assert message in str(error.value)


def test_words_behind_the_question(items):
    assert words(items({"answer": "a dog", "choices": DOGS})[0]) == f"What?\nA. a cat\nB. a dog\n{LETTER_INSTRUCTION}"
    assert words(items({"answer": "red"}, ask_short=True)[0]) == f"What?\n{module.SHORT_INSTRUCTION}"


def test_all_questions_of_conversations_are_asked(tmp_path):
    first = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *first, *first]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    items = module.read_items(tmp_path / "data.json", None, ask_short=True)
    for item in items:
        assert (item.kind, item.references, words(item)) == ("yesno", ("yes",), f"Is it?\n\n{module.SHORT_INSTRUCTION}")
    roles = [[message["role"] for message in item.conversation.messages] for item in items]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]


def images(items):
    return [item.conversation.images for item in items]


def pair(first, second):
    return {"image": None, "images": [f"{first}.png", f"{second}.png"], "answer": "x"}


def test_shuffled_shows_images_of_others(items, tmp_path):
    """Also where a copy has another name; as many images as before, and the same for the same seed."""
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    many = [{"image": f"{name}.png", "answer": "x"} for name in ("a", "a", "copy", "b", "b", "b")]
    made = items(*many, pair("c", "d"), pair("d", "e"), {"image": None, "answer": "x"})
    contents = [[medium_bytes(image) for image in own] for own in images(made)]
    for seed in range(20):
        mixed = module.shuffle_images(made, seed)
        others = [[medium_bytes(image) for image in own] for own in images(mixed)]
        assert [len(own) for own in others] == [len(own) for own in contents]
        assert all(own != other for own, other in zip(contents[:8], others[:8], strict=True))
        assert images(mixed) == images(module.shuffle_images(made, seed))
        assert [words(item) for item in mixed] == [words(item) for item in made]


def test_shuffled_differs_by_seed(items):
    made = items(*({"image": f"{name}.png", "answer": "x"} for name in "abcde"))
    assert len({str(images(module.shuffle_images(made, seed))) for seed in range(9)}) > 1


def test_shuffled_keeps_the_only_image(items):
    made = items({"answer": "x"}, {"answer": "y"}, pair("b", "c"))
    assert images(module.shuffle_images(made, 0)) == images(made)


def test_blank_images_are_grey_and_as_large(items):
    made = items({"answer": "x"}, pair("a", "b"), {"image": None, "answer": "x"})
    grey = [[load_rgb(image) for image in own] for own in images(module.blank_images(made))]
    assert [len(own) for own in grey] == [1, 2, 0]
    assert all((one.size, one.getcolors()) == ((8, 6), [(48, (128, 128, 128))]) for own in grey for one in own)


def test_leaked_counts_rows_by_what_images_show(items, tmp_path):
    """A copy under another name is found, too."""
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "b.png").read_bytes()).decode()
    rows = [{"images": ["copy.png", url], "question": "Why?", "answer": "So."}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    trained = read_conversations(tmp_path / "train.json", tmp_path).rows
    made = items(*({"image": f"{name}.png", "answer": "x"} for name in "aabc"))
    assert module.count_leaked(made, trained) == 3
    assert module.count_leaked(made, []) == 0


def figures(made, base, tuned, gain):
    """Figures as evaluate() puts them together, with a control of which the right image gains this much: low, high."""
    base, tuned = make_answers(made, *base), make_answers(made, *tuned)
    control = {
        "mean": 0.4,
        "low": 0.3,
        "high": 0.5,
        "rows": len(made),
        "seen": {"mean": 0.1, "low": gain[0], "high": gain[1], "it_looks": gain[0] > 0},
    }
    return {
        "base": evaluate.compute_metrics(base, made),
        "tuned": evaluate.compute_metrics(tuned, made),
        "compared": evaluate.compare_models(base, tuned, [item.cluster for item in made]),
        "controls": {"commonest answer": {"answer": "yes", "mean": 0.5}, "blank image": control},
    }  # fmt: skip


def test_report_of_a_model_that_learned(items, tmp_path):
    """40 images, half of them yes: the base always says no, and cannot be read in two cases."""
    for n in range(40):
        Image.new("RGB", (4, 4), (n, n, 0)).save(tmp_path / f"{n}.png")
    right = ["yes", "no"] * 20
    made = items(*({"image": f"{n}.png", "answer": own, "split": "ab"[n % 4 < 2]} for n, own in enumerate(right)))
    own = figures(made, ["no"] * 38 + ["perhaps"] * 2, right, (0.02, 0.2))
    text = evaluation_report.format_report(own | {"leaked": 3})
    assert "base                            0.475  0.329 to 0.625       40         2" in text
    assert "says yes to 50%, right would be 50%" in text
    assert "same rows: improved (+0.525" in text
    assert "21 rows gained, 0 lost, McNemar p 9.5e-07" in text
    assert "always 'yes' would score 0.500" in text
    assert "with the right image +0.100 (+0.020 to +0.200): it looks" in text
    assert "3 rows show an image that was trained on" in text
    assert "tuned, b                        1.000" in text
    assert own["tuned"]["mean_of_splits"] == 1.0


def test_report_of_a_model_that_learned_nothing(items):
    right = dict(zip("abcde", ["yes", "no", "no", "yes", "no"], strict=True))
    made = items(*({"image": f"{name}.png", "answer": own} for name, own in right.items()))
    text = evaluation_report.format_report(figures(made, ["no"] * 5, ["no"] * 5, (0.0, 0.2)))
    assert "same rows: no difference shown (+0.000, " in text
    assert "0 rows gained, 0 lost, McNemar p 1)" in text
    assert "(+0.000 to +0.200): no sign that it looks" in text
    assert "says yes to 0%, right would be 40%" in text


def test_report_of_one_row_claims_nothing(items):
    text = evaluation_report.format_report(figures(items({"answer": "yes"}), ["no"], ["yes"], (0.0, 0.2)))
    assert "same rows: no difference shown (+1.000, " in text


def test_tables_for_vlmevalkit(items, tmp_path):
    question = 'Which "one"\tis\r\nit? ü'
    listed = "Look:\nA. first\nB. second\nWhich?"
    made = items(
        {"question": question, "answer": "red", "split": "hard"},
        {"image": "b.png", "question": question, "answer": "a dog", "choices": DOGS},
        {"question": listed, "answer": "2", "choices": [1, 2, 3]},
    )
    text = module.write_vlmevalkit(made, tmp_path / "out.tsv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    assert list(rows[0]) == ["index", "image", "question", "A", "B", "C", "answer", "category"]
    pixels = [base64.b64decode(row.pop("image"), validate=True) for row in rows]
    assert pixels == [(tmp_path / f"{name}.png").read_bytes() for name in "aba"]
    assert [list(row.values()) for row in rows] == [
        ["0", question, "", "", "", "red", "hard"],
        ["1", question, "a cat", "a dog", "", "B", ""],
        ["2", listed, "1", "2", "3", "B", ""],
    ]


def test_tables_for_vlmevalkit_need_one_image_a_row(items, tmp_path):
    made = items({"answer": "x"}, pair("a", "b"))
    with pytest.raises(UserError, match=r"data\.json, row 2: .* one image per row, not 2"):
        module.write_vlmevalkit(made, tmp_path / "x.tsv")


def test_a_task_for_lmms_eval(items, tmp_path):
    """Its YAML names functions that are there, and they show the image and find the right answer right."""
    import importlib.util

    import yaml

    made = items({"answer": "red"}, {"answer": "a dog", "choices": DOGS}, {"answer": "no"})
    folder = write_lmms_eval(made, tmp_path / "task", "colours")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda own, node: own.construct_scalar(node))
    task = yaml.load((folder / "colours.yaml").read_text(), loader)
    table = task["dataset_kwargs"]["data_files"]["test"]
    rows = [json.loads(line) for line in Path(table).read_text(encoding="utf-8").splitlines()]
    found = importlib.util.spec_from_file_location("utils", folder / "utils.py")
    utils = importlib.util.module_from_spec(found)
    found.loader.exec_module(utils)
    for name in ("doc_to_visual", "doc_to_text", "process_results"):
        assert task[name] == f"utils.{name}"
    assert utils.doc_to_visual(rows[0])[0].size == (8, 6)
    said = [("Red.", "blue"), ("B. a dog", "A"), ("No, none.", "yes")]
    scores = [
        [utils.process_results(row, [text])["accuracy"] for text in pair] for row, pair in zip(rows, said, strict=True)
    ]
    assert scores == [[1, 0]] * 3


def test_one_box_for_all_is_the_median_in_shares(tmp_path):
    """Of images of several sizes; what it scores stands beside the model's figures."""
    rows = []
    for number, (side, box) in enumerate(((40, [0, 0, 20, 20]), (80, [0, 0, 40, 40]), (40, [20, 20, 40, 40]))):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "where?", "answer": "<bbox>", "objects": {"bbox": [box]}})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    found = evaluate.constant_answer(module.read_items(tmp_path / "data.json", None))
    assert found["answer"].startswith("the median box (0.00, 0.00, 0.50, 0.50")
    assert found["mean"] == found["iou"] == pytest.approx(2 / 3)
