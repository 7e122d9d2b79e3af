"""Checks of a composition that need no model: its adapters, how they shall be put together, and their bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...toolkit.core.errors import UserError
from ...toolkit.diffusion.load import EMBEDDED, resolve_base
from ...toolkit.formats.locate import adapter_facts, adapter_path, content_hash
from ...toolkit.formats.peft_merge import check_merge
from ...toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ..config.compose import ComposeConfig, ComposeSettings
from ..runs import library


def check_compose(config: ComposeConfig) -> None:
    """Checks the adapters and how they shall be put together, without a model.

    Raises:
        UserError: for no adapters, another number of weights, settings that exclude each other, or an adapter that is
            missing or says that it was made for another base.
    """
    if config.images is not None and (config.weights or config.merge):
        raise UserError("With --images the weights are learned: leave --weights and --merge out, or --images.")
    if config.preservation_weight:
        raise UserError(
            "--preservation-weight is for new adapters: what composing could preserve is already in its sources."
        )
    check_sources(config, config.base, resolve_base)


def check_sources(config: ComposeSettings, base: str, resolve: Callable[[str], str]) -> None:
    """What `check_compose` checks of any kind of model. resolve: a base's name -> its folder.

    Raises:
        UserError: see there.
    """
    if not config.adapters:
        raise UserError(
            "No adapters were given: name run folders, adapter folders, LoRA files or names in the library."
        )
    if config.weights and len(config.weights) != len(config.adapters):
        raise UserError(
            f"--weights holds {len(config.weights)} numbers for {len(config.adapters)} adapters: give one for each."
        )
    if config.merge:
        check_merge(config.merge)
        if config.density > 1:
            raise UserError(f"--density must be at most 1, not {config.density}.")
    wanted = resolve(base)
    for text in config.adapters:
        place = adapter_path(library.resolve(text))
        content_hash(place)  # says what is wrong with a file that is not an adapter
        check_base(text, adapter_facts(place).base, wanted, base, resolve)


def check_base(name: str, base: str, wanted: str, asked: str, resolve: Callable[[str], str]) -> None:
    """Raises UserError when an adapter says that it was made for another base than the resolved one.

    A base that is not on this machine is not fetched for the comparison.
    """
    here = base in EMBEDDED or base in EMBEDDED_VISION or Path(base).is_dir()
    if base and base != asked and not (here and is_same_base(base, wanted, resolve)):
        raise UserError(
            f"{name} was trained on {base}, not on {asked}: give --base {base}, or compose adapters of one base only."
        )


def is_same_base(base: str, wanted: str, resolve: Callable[[str], str]) -> bool:
    """Whether a base resolves to this folder; one of another kind does not."""
    try:
        return Path(resolve(base)).resolve() == Path(wanted).resolve()
    except UserError:
        return False
