"""Reads the README's set-up lines, so that .ci/run and the tests run what a newcomer is told to run.

python tests/helpers/readme_commands.py install|demo|test
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in lines if line.strip() and not line.startswith("#")
    ]


def setup(which: str) -> str:
    """The install part both set-up lines share, or what stands behind it in one of them."""
    pairs = [line.split(" && ") for line in commands() if line.startswith("pip install") and " && " in line]
    installs = {first for first, _ in pairs}
    if len(installs) != 1:
        raise SystemExit(f"the README's set-up lines install in different ways: {installs}")
    if which == "install":
        return installs.pop()
    wanted = {"demo": "rankfold demo", "test": "pytest"}[which]
    return next(second for _, second in pairs if second.startswith(wanted))


if __name__ == "__main__":
    print(setup(sys.argv[1]))
