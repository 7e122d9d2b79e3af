"""Adapters: the contract, the variants, and what follows from a variant's formula (merge, fold, composition).

Comes in what works on any model's layers. Imports core. Importing this package makes every variant known to PEFT.
"""

from . import variants
from .base import REGISTRY

CONFIGS = {layer.config_class.__name__: layer.config_class for layer in REGISTRY.values()}
"""The config class of each variant by its name."""

__all__ = ["CONFIGS", "variants"]
