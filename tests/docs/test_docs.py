"""Pages that are made from code stay true to it."""

from pathlib import Path

from rankfold.toolkit.adapters.describe import adapters_markdown
from rankfold.toolkit.adapters.registry import adapter_names

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adapters.md"


def test_the_adapters_page_is_what_the_registry_says():
    assert PAGE.read_text(encoding="utf-8") == adapters_markdown(), (
        "run: rankfold adapters --markdown > docs/adapters.md"
    )


def test_the_page_has_every_adapter():
    assert all(f"## {name}\n" in PAGE.read_text(encoding="utf-8") for name in adapter_names())


def test_families_are_all_in_the_docs():
    from rankfold.toolkit.diffusion.families import FAMILIES

    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        file = family.__module__.split(".")[-1] + ".py"
        (row,) = [line for line in text.splitlines() if f"| {file} |" in line]
        assert all(name in row for name in family.pipelines)
        assert family.licence in row
