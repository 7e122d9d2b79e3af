"""Pages that are made from code stay true to it."""

import re
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


def test_every_test_that_the_page_on_correctness_names_is_there():
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    named, file = [], ""
    for match in re.finditer(r"(test_\w+\.py)?(?:::(test_\w+))?", text):
        file = match[1] or file
        if match[1] or match[2]:
            named.append((file, match[2]))
    assert len(named) > 15
    for file, test in named:
        (path,) = ROOT.glob(f"tests/*/{file}")
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)


def test_the_table_of_defaults_is_true():
    import defaults

    assert defaults.FILE.read_text(encoding="utf-8") == defaults.page(), "python tests/helpers/defaults.py"
