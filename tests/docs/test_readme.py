"""What the README says is true: its commands exist with their options, its Python runs, its tree is the tree."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tree
from readme_commands import README, commands, setup

from rankfold.apps.cli import main
from rankfold.apps.cli.commands import COMMANDS

ROOT = README.parent
SHOWN = [line for line in commands() if line.startswith("rankfold ")]
INLINE = [
    text
    for text in re.findall(r"`(rankfold [^`]+)`", README.read_text(encoding="utf-8"))
    if not text.startswith("rankfold.")
]


def test_setup_lines():
    assert setup("install") == 'pip install -c constraints.txt -e ".[test]"'
    assert setup("demo") == "rankfold demo"
    assert setup("test") == "pytest"


@pytest.mark.parametrize("line", sorted({*SHOWN, *INLINE}))
def test_commands_exist_with_their_options(line, capsys):
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS
    if name in ("adapters", "doctor", "build-tiny"):
        return
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    for word in words:
        if word.startswith("--") and word not in ("--config", "--from"):
            assert word in text


def test_python_compiles_and_names_exist():
    import rankfold

    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
        compile(block, "README", "exec")
        for names in re.findall(r"from rankfold import (.+)", block):
            for name in names.split(", "):
                assert getattr(rankfold, name)


def test_the_tree_is_the_tree():
    """To write both again: python tests/helpers/tree.py"""
    text = README.read_text(encoding="utf-8")
    assert text == tree.with_tree(text)
    assert (ROOT / "docs" / "files.md").read_text(encoding="utf-8") == tree.file_page()


def test_packages_are_the_folders():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {"rankfold"}
    for floor in ("toolkit", "pipelines", "training", "apps"):
        for file in (ROOT / floor).rglob("__init__.py"):
            found.add(".".join(("rankfold", *file.parent.relative_to(ROOT).parts)))
    assert set(packages) == found


def test_linked_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
    assert Path(ROOT / "LICENSE").read_text(encoding="utf-8").strip().startswith("Apache License")
