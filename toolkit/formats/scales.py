"""By how much a layer's product is multiplied: alpha / rank, from the one place where a file says it.

In this order: an alpha beside the layer's tensors; the config that diffusers keeps in the header, or PEFT in adapter_config.json (with
patterns by PEFT's own rule, and alpha / sqrt(rank) under use_rslora); an alpha anywhere else in the header; otherwise 1, as every reader
takes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UserError
from ..core.records import parse_json_object, shorten

CONFIG_KEY = "lora_adapter_metadata"  # where diffusers keeps the configs of all parts
HEADER_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")

MAX_REPEATS = 3  # in a stranger's regular expression: matching takes time by this power of a name's length


@dataclass(frozen=True)
class PartConfig:
    """What a LoRA config says of scales."""

    alpha: float | None
    rank: int | None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, layer: str, rank: int | None) -> float | None:
        """The scale of a layer; None when no alpha is said. rank: of its tensors, where they show it."""
        alpha = value_of(self.alpha_pattern, layer, self.alpha)
        rank = rank or value_of(self.rank_pattern, layer, self.rank)
        if alpha is None or not rank:
            return None
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Scales:
    """All that a file says of scales beside its layers' tensors."""

    parts: dict[str, PartConfig]
    """By part of the pipeline; '' for all that have none of their own."""
    header_alpha: float | None = None
    header_key: str = ""

    def scale(self, part: str, layer: str, rank: int | None, alpha: float | None) -> float:
        """The scale of a layer. alpha: the one beside its tensors."""
        if alpha is not None:
            return alpha / rank if rank else 1.0
        config = self.parts.get(part) or self.parts.get("")
        said = config.scale(layer, rank) if config else None
        if said is not None:
            return said
        return self.header_alpha / rank if self.header_alpha is not None and rank else 1.0


def value_of(pattern: dict[str, Any], layer: str, default: Any) -> Any:
    """The value of the pattern that matches, by PEFT's own rule, which is imported for patterns alone: PEFT takes seconds."""
    if not pattern:
        return default
    from ..adapters.plugin import pattern_value

    return pattern_value(pattern, layer, default)


def read_scales(metadata: dict[str, str], path: Any, parts: tuple[str, ...]) -> Scales:
    """Reads a header.

    Raises:
        UserError: when what it says of scales cannot be read.
    """
    configs: dict[str, PartConfig] = {}
    if text := metadata.get(CONFIG_KEY):
        config = parse_json_object(text, f"{path}: {CONFIG_KEY} in the header")
        for part in parts:
            own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
            if own:
                configs[part] = part_config(own, f"{path}: {CONFIG_KEY} of {part} in the header")
        rest = {k: v for k, v in config.items() if not k.startswith(tuple(f"{part}." for part in parts))}
        if rest:
            configs[""] = part_config(rest, f"{path}: {CONFIG_KEY} in the header")
    for key in HEADER_ALPHAS:
        if key in metadata and metadata[key] not in ("", "None", "Dynamic"):
            return Scales(configs, number(metadata[key], f"{path}: {key} in the header"), key)
    return Scales(configs)


def part_config(values: dict[str, Any], where: str) -> PartConfig:
    """A LoRA config's values.

    Raises:
        UserError: when one of them is none that a config can have.
    """
    alpha, rank = values.get("lora_alpha", values.get("alpha")), values.get("r")
    return PartConfig(
        None if alpha is None else number(alpha, f"{where}: lora_alpha"),
        None if rank is None else int(number(rank, f"{where}: r")),
        pattern(values.get("alpha_pattern"), f"{where}: alpha_pattern"),
        {key: int(value) for key, value in pattern(values.get("rank_pattern"), f"{where}: rank_pattern").items()},
        flag(values.get("use_rslora"), f"{where}: use_rslora"),
    )


def pattern(value: Any, where: str) -> dict[str, float]:
    """A mapping from regular expressions to numbers.

    Raises:
        UserError: when it is none.
    """
    import re

    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shorten(value)}, and must map names of layers to numbers.")
    for key in value:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{where}: '{shorten(key)}' is no regular expression ({error}).") from error
        if len(re.findall(r"[*+{]", key)) > MAX_REPEATS or re.search(r"\)[*+{]", key):
            raise UserError(
                f"{where}: '{shorten(key)}' is a regular expression that may take hours to match; names of layers, with at most "
                f"{MAX_REPEATS} * or + and none behind a bracket, are read."
            )
    return {key: number(one, f"{where} of {shorten(key)}") for key, one in value.items()}


def number(value: Any, where: str) -> float:
    """A finite number.

    Raises:
        UserError: when it is none.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where} is {shorten(value)}, and must be a number.") from error
    if not math.isfinite(found):
        raise UserError(f"{where} is {shorten(value)}, and must be a finite number.")
    return found


def flag(value: Any, where: str) -> bool:
    """True or false.

    Raises:
        UserError: for anything else.
    """
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where} is {shorten(value)}, and must be true or false.")
    return bool(value)
