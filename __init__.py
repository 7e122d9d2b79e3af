"""Rankfold: teach a diffusion model your subject from a handful of images, with the low-rank adapter that fits.

Names are imported when they are first used, so that `import rankfold` costs nothing. Its adapters are known to PEFT from
here on (see toolkit/core/peft_hook.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .toolkit.core.peft_hook import import_with_peft

_WHERE = {
    "MosLoraConfig": ".toolkit.adapters.variants.moslora",
    "FvaeLoraConfig": ".toolkit.adapters.variants.fvae",
    "LoraTrfConfig": ".toolkit.adapters.variants.loratrf",
    "GloraConfig": ".toolkit.adapters.variants.glora",
    "TLoraConfig": ".toolkit.adapters.variants.tlora",
    "DeftConfig": ".toolkit.adapters.variants.deft",
    "auxiliary_losses": ".toolkit.adapters.auxiliary",
    "SubjectConfig": ".training.config.subject",
    "ComposeConfig": ".training.config.compose",
    "SearchConfig": ".training.config.search",
    "SearchTask": ".training.search.subject",
    "InstructConfig": ".training.config.instruct",
    "InstructSearchConfig": ".training.config.search",
    "InstructSearchTask": ".training.search.instruct",
    "open_chat": ".pipelines.chat",
    "answers": ".pipelines.chat",
    "train": ".training.launch.start",
    "compose": ".training.launch.start",
    "resume": ".training.launch.start",
    "Recipe": ".pipelines.generate",
    "generate": ".pipelines.generate",
    "export_adapter": ".pipelines.export",
    "UserError": ".toolkit.core.errors",
}
__all__ = list(_WHERE)

import_with_peft("rankfold.toolkit.adapters")  # absolute: pytest also imports this package under its folder's name


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    if name.endswith("Config") and name in (configs := import_module(".toolkit.adapters", __name__).CONFIGS):
        return configs[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
