"""What a training that goes on from another adapter takes from it: method, rank and alpha, read without its base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...toolkit.adapters.registry import method_values
from ...toolkit.core.errors import UserError
from ...toolkit.core.setting_names import as_flag
from ...toolkit.formats import native
from ...toolkit.formats.adapter_folder import check_adapter_folder, is_native, is_peft_folder
from ...toolkit.formats.locate import adapter_path
from ...toolkit.formats.read import read_lora
from .subject import SubjectConfig


def start_values(path: Path) -> tuple[str, int, float]:
    """(method, rank, alpha) of the adapter that a training goes on from, without its base; of several ranks the most common one.

    Raises:
        UserError: when there is no adapter, or its layers have no rank.
    """
    place = adapter_path(path)
    if is_native(place):
        return method_values(native.open_config(place / check_adapter_folder(place)[0]))
    if is_peft_folder(place):
        return method_values(native.open_config(place))
    file = read_lora(place)
    for layer in file.layers:
        if file.method(layer) != "lora":
            raise UserError(
                f"--start-from {path}: {layer} is of the method {file.method(layer)}; a file of plain LoRA can be trained further, or "
                "the run or the PEFT folder that it is from."
            )
    scales = Counter((file.rank(layer) or 0, file.scale(layer)) for layer in file.layers)
    (rank, scale), _ = scales.most_common(1)[0]
    return "lora", rank, rank * scale


def check_start(config: SubjectConfig) -> None:
    """Checks, without a model, that a training can go on from an adapter as the settings ask.

    Raises:
        UserError: for another method, rank or alpha than the adapter's, or settings that its own layers decide.
    """
    if config.start_from is None:
        return
    for name in ("target_modules", "text_target_modules", "blocks", "rank_pattern", "adapter_options"):
        if getattr(config, name):
            raise UserError(
                f"{as_flag(name)} does not go with --start-from, whose layers and ranks are kept: leave it out."
            )
    method, rank, alpha = start_values(config.start_from)
    if method != config.adapter:
        raise UserError(f"--start-from {config.start_from} is of the method {method}: give --adapter {method}.")
    for name, own in (("rank", rank), ("alpha", alpha)):
        if own and getattr(config, name) != own:
            raise UserError(
                f"--{name} {getattr(config, name):g}: the adapter {config.start_from} has {own:g}, which is kept; leave it out."
            )
