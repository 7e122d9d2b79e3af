"""The adapters of a composition, read, and the one that is made of them, written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...toolkit.adapters import composition
from ...toolkit.adapters.base import is_projection
from ...toolkit.adapters.fold import Folded
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion import textual_inversion as new_words
from ...toolkit.formats import native
from ...toolkit.formats.adapter_facts import AdapterFacts, ComposedSource
from ...toolkit.formats.adapter_folder import PARTS
from ...toolkit.formats.source import AdapterSource, load_source
from ...toolkit.formats.write import Part, peft_state
from ..config.compose import ComposeSettings, has_fixed_weights
from ..runs import library


def load_sources(config: ComposeSettings, model: Any) -> list[AdapterSource]:
    """The adapters as changes of this model's layers; what of a file is left out is said on stderr.

    Raises:
        UserError: for an adapter that does not fit, or changes a layer that cannot be composed, such as a norm.
    """
    sources = []
    for text in config.adapters:
        source = load_source(library.resolve(text), model, Path(text).name, ignore_unused=config.ignore_unused)
        for note in source.notes:
            print(f"rankfold: {note}", file=sys.stderr)
        check_layers(source, model)
        sources.append(source)
    return sources


def check_layers(source: AdapterSource, model: Any) -> None:
    """Raises UserError for a source that changes layers other than linear ones and convolutions."""
    for part, folded in source.parts.items():
        for name in folded:
            layer = getattr(model, part).get_submodule(name)
            if not is_projection(layer):
                raise UserError(
                    f"{source.name} changes {part}.{name}, a {type(layer).__name__}, and a composition is a LoRA, which has only linear "
                    "layers and convolutions: it can be used with rankfold sample, not composed."
                )


def merge_source_tokens(sources: Sequence[AdapterSource]) -> dict[str, torch.Tensor]:
    """The words that the sources bring."""
    return new_words.merge_token_embeddings([(source.name, source.token_embeddings) for source in sources])


def changed_parts(sources: Sequence[AdapterSource]) -> list[str]:
    """Parts of the pipeline that any source changes."""
    return [part for part in PARTS if any(part in source.parts for source in sources)]


def save_composition(
    folder: Path,
    parts: dict[str, Part],
    config: ComposeSettings,
    sources: Sequence[AdapterSource],
    weights: dict[str, list[float]],
    facts: AdapterFacts,
) -> None:
    """Writes an ordinary LoRA adapter, with the names, hashes and weights of what it was made of. facts: what else it says.

    Raises:
        UserError: for changes of full rank without a rank to cut them to.
    """
    error = 0.0
    learned_by_columns = config.tie == "column" and not has_fixed_weights(config)  # type: ignore[arg-type]
    for name, part in parts.items():
        folded, cut_error = truncate_part(part, config.max_rank)
        error = max(error, cut_error)
        state, lora = peft_state(Part(part.model, folded, ""))
        (folder / name).mkdir(parents=True, exist_ok=True)
        native.write_state(folder / name, state, lora)
    if words := merge_source_tokens(sources):
        new_words.save_token_embeddings(folder, words)
    replace(
        facts,
        adapter="lora",
        composed_of=tuple(ComposedSource(source.name, source.hash) for source in sources),
        composed_how=config.merge or ("weighted sum by columns" if learned_by_columns else "weighted sum"),
        composed_weights=weights,
        composed_cut_error=round(error, 4),
    ).save(folder)


def truncate_part(part: Part, max_rank: int) -> tuple[Folded, float]:
    """The part's changes at no more than this rank (0: as they are), and the largest relative error of a layer."""
    if not max_rank:
        full = [name for name, change in part.folded.items() if not change.is_low_rank]
        if full:
            raise UserError(
                f"The sum changes {full[0]} by a matrix of full rank, so it is not a plain LoRA: give --max-rank to cut it."
            )
        return part.folded, 0.0
    weights = {name: part.layer(name).weight.detach().flatten(1).float().cpu() for name in part.folded}  # type: ignore[union-attr]
    folded, errors = composition.truncate_ranks(part.folded, weights, max_rank)
    return folded, max(errors.values(), default=0.0)
