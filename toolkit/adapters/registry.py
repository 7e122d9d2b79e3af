"""Adapters by name: our variants, which register by being imported in __init__.py, and PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from peft import GraloraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeanutConfig, PeftConfig
from pydantic import TypeAdapter, ValidationError

from ..core.errors import UserError, did_you_mean
from .base import REGISTRY, AdapterConfig


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's own methods: its config, what it calls our common settings, and what makes it that method."""

    config: type[PeftConfig]
    field_names: dict[str, str]
    fixed_values: dict[str, Any] = field(default_factory=dict)
    scaling: Callable[[Any], float] | None = None
    """What a config's layers multiply their change by as trained, where they cannot be asked to set a strength themselves."""


LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
BASELINES = {
    "lora": Baseline(LoraConfig, LORA),
    "dora": Baseline(LoraConfig, LORA, {"use_dora": True}),
    "loha": Baseline(LoHaConfig, {"rank": "r", "alpha": "alpha", "dropout": "rank_dropout"}),
    "lokr": Baseline(LoKrConfig, {"rank": "r", "alpha": "alpha", "dropout": "rank_dropout"}),
    "gralora": Baseline(
        GraloraConfig,
        {"rank": "r", "alpha": "alpha", "dropout": "gralora_dropout"},
        scaling=lambda config: config.alpha / (config.r + config.hybrid_r),
    ),
    "peanut": Baseline(PeanutConfig, {"rank": "r"}, scaling=lambda config: config.scaling),
    # OFT rotates: its size is that of a block, and there is no alpha.
    "oft": Baseline(OFTConfig, {"rank": "oft_block_size", "dropout": "module_dropout"}, {"r": 0}),
}
SHARED_FIELDS = {field.name for field in fields(AdapterConfig)}


def adapter_names() -> list[str]:
    """All adapters that can be trained."""
    return [*BASELINES, *REGISTRY]


def option_help(name: str) -> dict[str, str]:
    """The fields of an adapter that others do not have, with their help."""
    if name in BASELINES:
        baseline, general = BASELINES[name], {f.name for f in fields(PeftConfig)} | {"target_modules"}
        taken = {*baseline.field_names.values(), *baseline.fixed_values, *general}
        return {f.name: f.metadata.get("help", "") for f in fields(baseline.config) if f.name not in taken}
    config = REGISTRY[name].config_class
    return {f.name: f.metadata.get("help", "") for f in fields(config) if f.name not in SHARED_FIELDS}


def make_config(
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...],
    options: dict[str, str] | None = None,
    rank_pattern: dict[str, int] | None = None,
) -> PeftConfig:
    """The PEFT config of an adapter.

    rank_pattern: ranks by regular expressions on the layers' names; their alphas keep alpha / rank as it is.

    Raises:
        UserError: for an unknown adapter, an unknown option, a value out of range, or an alpha or a dropout that the method has not.
    """
    if name not in adapter_names():
        raise UserError(f"--adapter {name}: there is no such adapter.{did_you_mean(name, adapter_names())}")
    baseline = BASELINES.get(name)
    config = baseline.config if baseline else REGISTRY[name].config_class
    values: dict[str, Any] = {"target_modules": list(target_modules)}
    for key, text in (options or {}).items():
        if key not in option_help(name):
            raise UserError(f"--adapter-options: {name} has no option '{key}'.{did_you_mean(key, option_help(name))}")
        values[key] = parse_option(config, key, text)
    if rank_pattern:
        if not {"rank_pattern", "alpha_pattern"} <= {field.name for field in fields(config)}:
            raise UserError(f"--rank-pattern does not go with --adapter {name}, whose layers all have one rank.")
        values["rank_pattern"] = dict(rank_pattern)
        values["alpha_pattern"] = {pattern: alpha * own / rank for pattern, own in rank_pattern.items()}
    common = {"rank": rank, "alpha": alpha, "dropout": dropout}
    names = baseline.field_names if baseline else {"rank": "r", "alpha": "alpha", "dropout": "dropout"}
    for setting, is_given in (("alpha", alpha not in (0, rank)), ("dropout", dropout != 0)):
        if is_given and setting not in names:
            raise UserError(f"--adapter {name} has no {setting}: leave --{setting} out.")
    values |= {theirs: common[ours] for ours, theirs in names.items()} | (baseline.fixed_values if baseline else {})
    try:
        return config(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"--adapter {name}: {error}") from error


def parse_option(config: type[PeftConfig], key: str, text: str) -> Any:
    """A value given as text, in the type of the config's field; mappings and lists are JSON.

    Raises:
        UserError: when the text does not fit the type.
    """
    adapter = TypeAdapter(get_type_hints(config)[key])
    try:
        return adapter.validate_json(text) if text[:1] in "[{" else adapter.validate_python(text)
    except ValidationError as error:
        raise UserError(f"--adapter-options {key}: {error.errors()[0]['msg']}.") from error


def trained_scaling(config: PeftConfig) -> float:
    """What the layers of a config multiply their change by as trained. Only for methods whose layers cannot set a strength themselves."""
    [scaling] = [one.scaling for one in BASELINES.values() if type(config) is one.config and one.scaling]
    return scaling(config)


def method_values(config: PeftConfig) -> tuple[str, int, float]:
    """(name, rank, alpha) of the adapter that a PEFT config is of; alpha 0 where the method has none.

    Raises:
        UserError: for a method that is not among `adapter_names`.
    """
    for name, variant in REGISTRY.items():
        if isinstance(config, variant.config_class):
            return name, config.r, config.alpha or config.r  # type: ignore[attr-defined]
    for name, baseline in reversed(BASELINES.items()):  # what is more than plain LoRA comes behind it
        fixed = all(getattr(config, key) == value for key, value in baseline.fixed_values.items() if value)
        if type(config) is baseline.config and fixed:
            values = {ours: getattr(config, theirs) for ours, theirs in baseline.field_names.items()}
            return name, values["rank"], values.get("alpha", 0)
    raise UserError(
        f"Adapters of PEFT's method {config.peft_type} cannot be trained here: known are {', '.join(adapter_names())}."
    )
