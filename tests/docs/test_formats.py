"""docs/formats.md says what happens."""

from pathlib import Path

from format_table import ROOT, table


def test_the_table_of_formats_is_what_happens():
    assert Path(ROOT / "docs" / "formats.md").read_text(encoding="utf-8") == table(), (
        "python tests/helpers/format_table.py"
    )
