"""The adapter variants, a file each, found by being here: importing this package registers all of them with PEFT.

Comes in a config, its tensors and its formula (docs/adding-an-adapter.md). Imports adapters/base.py and what lies below it.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
