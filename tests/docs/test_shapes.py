"""Public functions say the shapes of the tensors that they take and return, by suffix or in the docstring (docs/design.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("toolkit", "pipelines", "training")
TENSOR = re.compile(r"(torch\.)?Tensor( \| None)?")
SUFFIX = re.compile(r"_[A-Z1]+$")
SHAPE = re.compile(r"\([\w.* /]+,[^)]*\)|shape|scalar|_[A-Z1]{1,5}\b")


def is_tensor(annotation: ast.expr | None) -> bool:
    return annotation is not None and TENSOR.fullmatch(ast.unparse(annotation)) is not None


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of the file and methods of its classes; not those within functions."""
    for node in tree.body:
        for one in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
                yield one


def without_shapes(function: ast.FunctionDef) -> list[str]:
    """Tensors whose names say no shape."""
    given = [*function.args.args, *function.args.kwonlyargs]
    names = [arg.arg for arg in given if is_tensor(arg.annotation) and not SUFFIX.search(arg.arg)]
    return names + ["what it returns"] * is_tensor(function.returns)


def test_shapes_are_said():
    functions = [
        (path, function)
        for floor in FLOORS
        for path in sorted((ROOT / floor).rglob("*.py"))
        for function in public_functions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(functions) > 1000
    said = {function.name for _, function in functions if SHAPE.search(ast.get_docstring(function) or "")}
    silent = [
        f"{path.relative_to(ROOT)}: {function.name}: {', '.join(names)}"
        for path, function in functions
        if (names := without_shapes(function))
        and not SHAPE.search(text := ast.get_docstring(function) or "")
        and not (not text and function.name in said)  # overrides what says it
    ]
    assert not silent, "\n".join(silent)
