"""Pages that are made from code stay true to it."""

from pathlib import Path

from rankfold.toolkit.adapters.describe import markdown
from rankfold.toolkit.adapters.registry import adapter_names

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"


def test_the_adapters_page_is_what_the_registry_says():
    assert PAGE.read_text() == markdown(), "run: rankfold adapters --markdown > docs/adapters.md"


def test_the_page_has_every_adapter():
    assert all(f"## {name}\n" in PAGE.read_text() for name in adapter_names())
