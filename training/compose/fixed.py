"""Composition by fixed weights, or by PEFT's merges: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ...toolkit.adapters import composition
from ...toolkit.core.run_folder import Run
from ...toolkit.diffusion.load import open_model, resolve_base
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.formats.adapter_facts import AdapterFacts
from ...toolkit.formats.peft_merge import peft_merge
from ...toolkit.formats.write import Part
from ..config.checks import check_ranges
from ..config.compose import ComposeConfig
from ..runs.begin import prepare_folder, restore_previous
from .checks import check_compose
from .sources import changed_parts, load_sources, save_composition


def compose_fixed(
    config: ComposeConfig, keep: Collection[str] = (), still_free: Callable[[], None] = lambda: None
) -> Run:
    """The sum by fixed weights, or PEFT's merge, as a run folder with an adapter.

    keep, still_free: see `prepare_folder`.

    Raises:
        UserError: for adapters that do not fit, and as `check_compose` does.
    """
    base = check_fixed(config)
    return write_composition(config, lambda: open_model(base, DTYPES[config.precision]), config.facts, keep, still_free)


def check_fixed(config: ComposeConfig) -> str:
    """All checks of a composition by fixed weights that need no model; returns the base's folder."""
    check_ranges(config)
    check_compose(config)
    return resolve_base(config.base)


def write_composition(
    config: Any,
    open_base: Callable[[], Any],
    facts: AdapterFacts,
    keep: Collection[str],
    still_free: Callable[[], None],
    finish: Callable[[Path], None] = lambda folder: None,
) -> Run:
    """A run folder with the sum, or PEFT's merge, of checked adapters.

    facts: what its adapter says of itself; keep, still_free: see `prepare_folder`; finish: writes more into the adapter's folder.
    """
    run = Run(config.out)
    prepare_folder(run, config, keep, still_free)
    state, error = "failed", "ended by the system"
    try:
        model = open_base()
        sources = load_sources(config, model)
        weights = list(config.weights) or [1 / len(sources)] * len(sources)
        parts = {}
        for part in changed_parts(sources):
            folded = [source.parts.get(part, {}) for source in sources]
            if config.merge:
                whole = peft_merge(
                    getattr(model, part), folded, weights, config.merge, density=config.density, seed=config.seed
                )
            else:
                whole = composition.sum_sources(folded, weights)
            parts[part] = Part(getattr(model, part), whole, "")
        save_composition(run.adapter, parts, config, sources, {"everywhere": weights}, facts)
        finish(run.adapter)
        run.discard_aside()
        state, error = "running" if config.export else "done", None
    except Exception as fault:
        error = str(fault)
        raise
    finally:
        if state == "done" or not restore_previous(run, keep):
            run.set_status(state=state, step=0, total=0, error=error)
    return run
