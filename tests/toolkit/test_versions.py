"""Versions that do not fit together are named with the pip line that mends it, before anything is loaded."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from rankfold.toolkit.core import versions

ROOT = Path(__file__).parents[2]


def test_what_is_installed_fits():
    assert list(versions.incompatible_versions()) == []
    assert list(versions.untested_versions()) == []
    assert all(
        Version(versions.min_peft_version(library)) >= Version("0.10") for library in versions.PEFT_VERSION_FILES
    )


def test_a_pair_that_does_not_fit_is_named_with_its_cure():
    """The pair that broke every new user: transformers 5.24 asked for a PEFT that was not out."""
    known = {"transformers": "5.24.0", "peft": "0.21.2", "diffusers": "0.42.1"}
    (sentence,) = versions.incompatible_versions(known.get, {"transformers": "0.22.0", "diffusers": "0.17.0"}.get)
    assert sentence.startswith(
        "transformers 5.24.0 asks for peft 0.22.0 or newer, and 0.21.2 is installed: pip install "
    )
    assert [Requirement(text).name for text in re.findall(r'"(.*?)"', sentence)] == ["transformers", "peft"]


def test_what_is_newer_than_tested_is_named():
    found = list(versions.untested_versions(lambda name: {"torch": "99.0"}.get(name, "")))
    assert len(found) == 1
    assert "torch 99.0" in found[0]
    assert "<" in found[0]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_lie_within_the_bounds(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = {pin.name.lower(): pin for line in lines if line and not line.startswith("#") for pin in [Requirement(line)]}
    assert not any("/" in line for line in lines if not line.startswith("#"))
    for library, wanted in versions.version_bounds().items():
        if library in pins:
            (pin,) = pins[library].specifier
            assert pin.operator == "=="
            assert wanted.specifier.contains(pin.version), library
            if "lowest" in name:
                least = next(one.version for one in wanted.specifier if one.operator == ">=")
                assert Version(pin.version) == Version(least), library
    assert {"torch", "diffusers", "transformers", "peft", "accelerate"} <= pins.keys()
