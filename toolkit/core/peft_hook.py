"""A module imported as soon as PEFT is: so `import rankfold` makes its adapters known to PEFT at no cost for those who do not use PEFT.

When PEFT is there already, the module is imported at once; otherwise after PEFT's own import, whenever that comes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_with_peft(module: str) -> None:
    """Imports a module now, or as soon as PEFT is imported. module: its absolute name."""
    if "peft" in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, AfterPeft(module))


class AfterPeft(MetaPathFinder):
    """Finds `peft` as everybody does, and has another module imported after it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of `peft`, with the other module imported after its execution; None for any other module."""
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_import(peft: ModuleType) -> None:
            execute(peft)
            importlib.import_module(self.module)

        spec.loader.exec_module = execute_and_import  # type: ignore[method-assign]
        return spec
