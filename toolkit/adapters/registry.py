"""Adapters by name: our variants, read from the files beside this one, and plain LoRA from PEFT."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from peft import LoraConfig, PeftConfig
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, nearest
from .base import REGISTRY, AdapterConfig

BASELINES: dict[str, type[PeftConfig]] = {"lora": LoraConfig}
SHARED = {field.name for field in fields(AdapterConfig)}
SUPPORT = ("base", "registry", "fold", "files", "attach")

for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if module.name not in SUPPORT:
        importlib.import_module(f"{__package__}.{module.name}")


def adapter_names() -> list[str]:
    """All adapters that can be trained."""
    return [*BASELINES, *REGISTRY]


def options_of(name: str) -> dict[str, str]:
    """The fields of a variant that others do not have, with their help."""
    if name in BASELINES:
        return {}
    config = REGISTRY[name].config_class
    return {f.name: f.metadata.get("help", "") for f in fields(config) if f.name not in SHARED}


def make_config(
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...],
    options: dict[str, str] | None = None,
) -> PeftConfig:
    """The PEFT config of an adapter.

    Raises:
        UserError: for an unknown adapter, an unknown option, or a value out of range.
    """
    if name not in adapter_names():
        raise UserError(f"--adapter {name}: there is no such adapter.{nearest(name, adapter_names())}")
    if name in BASELINES:
        if options:
            raise UserError(f"--adapter-options: {name} has no options of its own.")
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules),  # type: ignore[arg-type]
        )
    config = REGISTRY[name].config_class
    values: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in options_of(name):
            raise UserError(f"--adapter-options: {name} has no option '{key}'.{nearest(key, options_of(name))}")
        try:
            values[key] = TypeAdapter(get_type_hints(config)[key]).validate_python(text)
        except ValidationError as error:
            raise UserError(f"--adapter-options {key}: {error.errors()[0]['msg']}.") from error
    try:
        return config(r=rank, alpha=alpha, dropout=dropout, target_modules=list(target_modules), **values)
    except ValueError as error:
        raise UserError(f"--adapter {name}: {error}") from error
