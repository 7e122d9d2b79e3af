"""What adapters say of themselves: one record, whoever writes it and whatever holds it."""

from __future__ import annotations

import json

import pytest

from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.formats.adapter_facts import AdapterFacts, ComposedSource, facts_of_header, read_facts

FACTS = AdapterFacts(
    "tiny",
    token="sks",
    class_noun="creature",
    adapter="lora",
    also=("ohwx red dog", "zwx cat"),
    max_pixels=4096,
    pad_to_square=True,
    composed_of=(ComposedSource("a", "12"), ComposedSource("b", "34")),
    composed_how="weighted sum",
    composed_weights={"everywhere": [0.5, 0.25]},
    composed_cut_error=0.125,
    data=({"file": "rows.jsonl", "rows": 3},),
    other={"ss_network_dim": "8"},
)


def test_folder_and_header_say_the_same(tmp_path):
    FACTS.save(tmp_path)
    assert read_facts(tmp_path) == FACTS
    assert facts_of_header(FACTS.to_header()) == FACTS
    assert all(isinstance(text, str) for text in FACTS.to_header().values())
    assert json.loads((tmp_path / "rankfold.json").read_text())["composed_weights"] == {"everywhere": [0.5, 0.25]}


def test_what_is_not_said_is_empty(tmp_path):
    assert read_facts(tmp_path) == AdapterFacts()
    assert AdapterFacts().to_json() == {}


def test_tokens_and_trigger_words():
    assert FACTS.tokens == ["sks", "ohwx", "zwx"]
    assert FACTS.trigger_words == "sks creature"
    assert AdapterFacts().tokens == []
    assert facts_of_header({"modelspec.trigger_phrase": "zwx cat"}).trigger_words == "zwx cat"


def test_files_of_earlier_versions_are_read(tmp_path):
    """JSON inside of JSON, and subjects in one text."""
    said = {
        "base": "tiny",
        "also": "ohwx red dog, zwx cat",
        "composed_of": '[{"name": "a", "hash": "12"}]',
        "composed_weights": '{"everywhere": [1.0]}',
        "composed_cut_error": "0.1250",
        "max_pixels": None,
    }
    (tmp_path / "rankfold.json").write_text(json.dumps(said))
    found = read_facts(tmp_path)
    assert found.also == FACTS.also
    assert found.composed_of == (ComposedSource("a", "12"),)
    assert found.composed_weights == {"everywhere": [1.0]}
    assert found.composed_cut_error == 0.125
    assert found.max_pixels is None


@pytest.mark.parametrize(
    "said", [{"base": 3}, {"composed_of": [1]}, {"max_pixels": "many"}, {"composed_weights": {"everywhere": ["x"]}}]
)
def test_damage_is_named(said, tmp_path):
    (tmp_path / "rankfold.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"rankfold.json: {next(iter(said))} cannot be read"):
        read_facts(tmp_path)


def test_entries_of_other_tools_are_kept_as_they_are():
    found = facts_of_header({"data": "my photos", "ss_network_dim": "8"})
    assert found == AdapterFacts(other={"data": "my photos", "ss_network_dim": "8"})
