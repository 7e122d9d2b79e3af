"""Rankfold: teach a diffusion model your subject from a handful of pictures, with the low-rank adapter that fits.

Names are imported when they are first used, so that `import rankfold` costs nothing. Its adapters are known to PEFT from
here on (see toolkit/peft_hook.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .toolkit.peft_hook import register_with_peft

_WHERE = {
    "MosLoraConfig": ".toolkit.adapters",
    "FvaeLoraConfig": ".toolkit.adapters",
    "LoraTrfConfig": ".toolkit.adapters",
    "GloraConfig": ".toolkit.adapters",
    "auxiliary_losses": ".toolkit.adapters.auxiliary",
    "SubjectConfig": ".training.config",
    "ComposeConfig": ".training.config",
    "SearchConfig": ".training.config",
    "SearchTask": ".training.search_subject",
    "InstructConfig": ".training.config",
    "InstructSearchConfig": ".training.config",
    "InstructSearchTask": ".training.search_instruct",
    "open_chat": ".pipelines.chat",
    "answers": ".pipelines.chat",
    "train": ".training.start",
    "compose": ".training.start",
    "resume": ".training.start",
    "Recipe": ".pipelines.generate",
    "generate": ".pipelines.generate",
    "export_adapter": ".pipelines.export",
    "UserError": ".toolkit.errors",
}
__all__ = list(_WHERE)

register_with_peft()


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
