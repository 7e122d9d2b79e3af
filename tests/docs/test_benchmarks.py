"""Benchmarks are run by hand, so nothing else would notice that one of them no longer fits the library."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_all_benchmarks_can_be_imported():
    names = sorted(file.stem for folder in (FOLDER, FOLDER / "peers") for file in folder.glob("*.py"))
    code = "import importlib, sys; sys.path.append('peers'); "
    code += "; ".join(f"importlib.import_module({name!r})" for name in names)
    result = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
