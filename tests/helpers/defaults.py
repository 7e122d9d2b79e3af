"""Writes the table of docs/defaults.md from the families: `python tests/helpers/defaults.py`."""

import re
from pathlib import Path

from rankfold.toolkit.diffusion.families import FAMILIES

FILE = Path(__file__).resolve().parents[2] / "docs" / "defaults.md"
BLOCK = re.compile(r"(<!-- defaults.*? -->\n).*?(<!-- end -->)", re.DOTALL)


def table():
    """A row for each family."""
    rows = ["| family | learning rate | text encoders | batch | rank | shift | preview steps | guidance | source |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for family in FAMILIES:
        own = family.training_defaults
        shift = own.timestep_shift if family.is_flow else "-"
        rows.append(
            f"| {family.__name__} | {own.learning_rate:g} | {own.text_learning_rate:g} | {own.batch_size} | {own.rank} | {shift} | "
            f"{own.preview_steps} | {family.default_guidance():g} | {own.source} |"
        )
    return "\n".join(rows) + "\n"


def page():
    """The page as it should be."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
