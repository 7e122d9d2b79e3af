"""The guides, followed literally in a copy of the project: one new file, and everything knows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "__init__.py",
    "pyproject.toml",
    "toolkit",
    "pipelines",
    "training",
    "apps",
    "assets",
    "tests",
    "docs",
    "README.md",
)


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, as a package named rankfold."""
    folder = tmp_path / "rankfold"
    folder.mkdir()
    for path in map(ROOT.joinpath, NEEDED):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "assets" / "demo", folder / "assets" / "demo", dirs_exist_ok=True)
    return folder


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(copy, *argv):
    path = os.environ | {"PYTHONPATH": str(copy.parent)}
    done = subprocess.run([sys.executable, *argv], cwd=copy, env=path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def pytest_in(copy, *argv):
    return run(copy, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", *argv)


def commands(page):
    """The guide's commands, one list of words each."""
    return [line.split() for block in blocks(page, "bash") for line in block.splitlines() if line]


@pytest.mark.slow
def test_an_adapter_is_one_file(copy):
    page = "adding-an-adapter.md"
    code, usage = blocks(page)
    (copy / "toolkit" / "adapters" / "variants" / "rowlora.py").write_text(code, encoding="utf-8")
    listed, train, export, markdown, contract = commands(page)
    assert "rowlora\n    train_rows" in run(copy, "-m", "rankfold.apps.cli", *listed[1:])
    run(copy, "-m", "rankfold.apps.cli", *train[1:], "--preview-every", "0", "--batch-size", "1")
    assert "exact" in run(copy, "-m", "rankfold.apps.cli", *export[1:])
    page_text = run(copy, "-m", "rankfold.apps.cli", *markdown[1 : markdown.index(">")])
    assert "## rowlora" in page_text
    assert "`train_rows`" in page_text
    setup = "from torch import nn\nmodel = nn.Sequential()\nmodel.add_module('q_proj', nn.Linear(8, 8))\n"
    run(copy, "-c", setup + usage)
    pytest_in(copy, *contract[1:])
    pytest_in(copy, "tests/toolkit/test_peft_contract.py", "-k", "rowlora")


@pytest.mark.slow
def test_a_family_is_one_file(copy):
    page = "adding-a-family.md"
    code, builder = blocks(page)
    (copy / "toolkit" / "diffusion" / "families" / "aura_flow.py").write_text(code, encoding="utf-8")
    helper = copy / "tests" / "helpers" / "tiny_families.py"
    helper.write_text(helper.read_text(encoding="utf-8") + "\n\n" + builder, encoding="utf-8")
    ((_, file, *chosen),) = commands(page)
    names = "predicts or encodes or trains"
    pytest_in(copy, file, chosen[0], f"{chosen[1]} and ({names})")
