"""Spoilt inputs: each is used, passed over, or refused in a sentence, quickly, in little memory, and nothing is written elsewhere.

tests/helpers/fuzzing.py says which inputs there are and how they are spoilt.
"""

import fuzzing
import pytest

PASSED_OVER = ("cache", "run_data", "run_files", "run_records", "run_status")
"""What is as if it were not there when it is damaged."""


def check(found):
    assert not found.faults, "\n".join(f"{fault}\n{how}" for fault, how in found.faults.items())
    assert set(found.tried) == set(fuzzing.ENTRIES)
    for name, tried in found.tried.items():  # spoilt enough to be refused, and not so much that nothing else is seen
        assert name in PASSED_OVER or 0 < found.refused[name] <= tried, name


def test_two_thousand_inputs():
    check(fuzzing.try_inputs(2000))


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_inputs():
    check(fuzzing.try_inputs(100_000, seed=1))


def test_what_goes_wrong_is_seen(monkeypatch, tmp_path):
    def fail(random, work):
        (work / "input").write_text("x")
        raise KeyError("x")

    def write_elsewhere(random, work):
        (work.parent / "elsewhere").write_text("x")

    def take_memory(random, work):
        bytearray(600 * 2**20)

    entries = {"a": fail, "b": write_elsewhere, "c": take_memory}
    monkeypatch.setattr(fuzzing, "ENTRIES", entries)
    found = fuzzing.try_inputs(3, keep=tmp_path)
    assert [fault.split(":")[0] for fault in found.faults] == ["a", "b", "c"]
    assert (next(tmp_path.glob("a-*")) / "input").read_text() == "x"


def test_the_same_seed_gives_the_same_inputs():
    one, other = (fuzzing.try_inputs(44, seed=3).refused for _ in range(2))
    assert one == other
