"""`import rankfold` makes our adapters known to PEFT, at no cost for those who do not use PEFT.

When PEFT is there already, our adapters are registered at once; otherwise behind PEFT's own import, whenever that comes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ADAPTERS = "rankfold.toolkit.adapters"  # absolute: pytest also imports this package under its folder's name


def register_with_peft() -> None:
    """Registers now, or as soon as PEFT is imported."""
    if "peft" in sys.modules:
        importlib.import_module(ADAPTERS)
    else:
        sys.meta_path.insert(0, BehindPeft())


class BehindPeft(MetaPathFinder):
    """Finds `peft` as everybody does, and has our adapters imported behind it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of `peft`, with our registration behind its execution; None for any other module."""
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(ADAPTERS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
