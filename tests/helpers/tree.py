"""The tree of the project in the README (rooms) and in docs/files.md (a line for each file), from the docstrings.

python tests/helpers/tree.py writes both; tests/docs/test_readme.py compares.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("toolkit", "pipelines", "training", "apps")
OTHERS = {
    "assets/": "the embedded models, the demo's images, recipes, prompts, configs for several devices",
    "benchmarks/": "speed of training, adapters and search; what variants, composition and search are worth",
    "docs/": "a page for each subject; files.md has a line for each file",
    "tests/": "by floor; helpers/ is what they share",
}
WIDTH = 30


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def rooms() -> list[Path]:
    """Folders with modules, from the top of each floor down."""
    return [path.parent for floor in FLOORS for path in sorted((ROOT / floor).rglob("__init__.py"))]


def room_tree() -> str:
    """A line for each room."""
    lines = []
    for room in rooms():
        name = room.relative_to(ROOT)
        shown = f"{'  ' * (len(name.parts) - 1)}{name.parts[-1]}/"
        lines.append(f"{shown:{WIDTH}}{first_line(room / '__init__.py')}")
    return "\n".join([*lines, *(f"{name:{WIDTH}}{text}" for name, text in OTHERS.items())]) + "\n"


def file_page() -> str:
    """docs/files.md."""
    lines = ["# Every file in a line", "", "Written by tests/helpers/tree.py from the docstrings."]
    for room in rooms():
        lines += ["", f"## {room.relative_to(ROOT).as_posix()}", "", first_line(room / "__init__.py") + ".", ""]
        files = [path for path in sorted(room.glob("*.py")) if path.name != "__init__.py"]
        lines += [f"- `{path.name}`: {first_line(path)}" for path in files]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def with_tree(readme: str) -> str:
    """The README with its tree as it should be."""
    head, rest = readme.split("## The tree\n\n```text\n")
    return f"{head}## The tree\n\n```text\n{room_tree()}```{rest.split('```', 1)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tree(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "files.md").write_text(file_page(), encoding="utf-8")
