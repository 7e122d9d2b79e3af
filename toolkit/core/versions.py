"""Which installed versions do not fit together, found without importing the libraries, and the pip line that mends it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from .errors import UserError

# Files in which a library says which PEFT its own loaders ask for; the exports are proven through these loaders.
PEFT_VERSION_FILES = {"transformers": "integrations/peft.py", "diffusers": "utils/constants.py"}
MIN_PEFT_NAME = "MIN_PEFT_VERSION"


def installed_version(name: str) -> str:
    """Version of a package, '' when it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def min_peft_version(library: str) -> str:
    """The oldest PEFT that a library's loaders take, as its source says; '' when it does not say."""
    spec = importlib.util.find_spec(library)
    file = Path(spec.origin).parent / PEFT_VERSION_FILES[library] if spec and spec.origin else None
    if file is None or not file.is_file():
        return ""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(one, ast.Name) and one.id == MIN_PEFT_NAME for one in node.targets
        ):
            return str(getattr(node.value, "value", ""))
    return ""


def version_bounds() -> dict[str, Requirement]:
    """What rankfold asks of each library, extras included."""
    found = [Requirement(text) for text in requires("rankfold") or []]
    return {one.name.lower(): one for one in found if str(one.specifier)}


def incompatible_versions(
    of: Callable[[str], str] = installed_version, asked: Callable[[str], str] = min_peft_version
) -> Iterator[str]:
    """A sentence for each pair of libraries that cannot work together. of: versions; asked: what a library asks of PEFT."""
    peft = of("peft")
    for library in PEFT_VERSION_FILES:
        least = asked(library)
        if of(library) and peft and least and Version(peft) < Version(least):
            yield (
                f"{library} {of(library)} asks for peft {least} or newer, and {peft} is installed: "
                f'pip install "{version_bounds()[library]}" "{version_bounds()["peft"]}"'
            )


def untested_versions(of: Callable[[str], str] = installed_version) -> Iterator[str]:
    """A sentence for each library whose version rankfold has not been tested with."""
    for name, wanted in version_bounds().items():
        found = of(name)
        if found and not wanted.specifier.contains(found, prereleases=True):
            yield f'{name} {found} is not among the versions that rankfold is tested with: pip install "{name}{wanted.specifier}"'


@cache
def check_versions() -> None:
    """Says on stderr, once, which versions are untested.

    Raises:
        UserError: for libraries that cannot work together.
    """
    faults = list(incompatible_versions())
    if faults:
        raise UserError(faults[0])
    for sentence in untested_versions():
        print(f"rankfold: {sentence}", file=sys.stderr)
