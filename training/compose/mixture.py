"""The mixture of adapters whose coefficients are learned (Asadi, Beitollahi et al. 2024, arXiv 2402.15414)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...toolkit.adapters import composition
from ...toolkit.adapters.composition import ColumnFactors, MixingCoefficients, Mixture
from ...toolkit.core.errors import UserError
from ...toolkit.diffusion import textual_inversion as new_words
from ...toolkit.formats.adapter_facts import AdapterFacts
from ...toolkit.formats.source import AdapterSource
from ...toolkit.formats.write import Part
from ..config.compose import ComposeConfig, ComposeInstructConfig
from .sources import changed_parts, load_sources, merge_source_tokens, save_composition


class AdapterMixture:
    """The trainable of learned composition: frozen adapters on the model, and their coefficients, which alone are trained."""

    may_change_text = True

    def __init__(self, config: ComposeConfig | ComposeInstructConfig, facts: AdapterFacts) -> None:
        """facts: what the composed adapter says of itself."""
        self.config, self.facts = config, facts
        self.sources: list[AdapterSource] = []
        self.mixtures: dict[str, dict[str, Mixture]] = {}
        """By part and layer."""
        self.parts: dict[str, nn.Module] = {}
        self.token_embeddings: dict[str, torch.Tensor] = {}
        """Tokens that the sources bring."""

    def attach(self, model: Any) -> dict[str, nn.Module]:
        """Puts the sources on a model with the parts of a pipeline (PARTS), alike at the start, and the tokens they bring.

        Raises:
            UserError: for a sum that has no exact plain LoRA, where no rank to cut it to was given.
        """
        config = self.config
        self.sources = load_sources(config, model)
        shared = None
        if config.tie != "column":
            shared = composition.coefficient_factory(
                config.tie,
                lambda: MixingCoefficients(len(self.sources), temperature=config.temperature, free=config.free),
            )
        for part in changed_parts(self.sources):
            module = getattr(model, part).requires_grad_(False)
            folded = [source.parts.get(part, {}) for source in self.sources]

            def coefficients_of(name: str, part: str = part, module: Any = module, folded: Any = folded) -> Any:
                if shared is not None:
                    return shared(f"{part}.{name}")
                changes = [source[name] for source in folded if name in source]
                columns = composition.count_columns(module.get_submodule(name), changes)
                return ColumnFactors(len(folded), columns, penalty=config.column_penalty)

            self.mixtures[part] = composition.attach_sources(module, folded, coefficients_of)
            check_representable(self.mixtures[part], config.max_rank)
        layers = sum(len(mixtures) for mixtures in self.mixtures.values())
        scalars = sum(coefficients.logits.numel() for coefficients in self.coefficients())
        print(f"Learning {scalars} weights: {len(self.sources)} adapters, {layers} layers, weights by {config.tie}")
        self.parts = {part: getattr(model, part) for part in self.mixtures}
        self.token_embeddings = merge_source_tokens(self.sources)
        if self.token_embeddings:
            new_words.add_tokens_to_pipeline(model.text_pipeline(), self.token_embeddings)
        return self.parts

    def coefficients(self) -> list[MixingCoefficients | ColumnFactors]:
        """The sets of coefficients, each once."""
        return list(
            {id(m.coefficients): m.coefficients for part in self.mixtures.values() for m in part.values()}.values()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The coefficients' logits."""
        logits = [coefficients.logits for coefficients in self.coefficients()]
        return [{"params": logits, "lr": self.config.learning_rate}]

    def is_dead(self) -> bool:
        """Never: the sources are trained already."""
        return False

    def save(self, folder: Path) -> None:
        """Writes the sum as an ordinary adapter."""
        parts = {
            part: Part(self.parts[part], composition.weighted_sums(mixtures), "")
            for part, mixtures in self.mixtures.items()
        }
        learned = {
            f"{part}.{name}": [
                round(float(w.mean()), 5) for w in mixture.coefficients().detach()
            ]  # of columns, their mean
            for part, mixtures in self.mixtures.items()
            for name, mixture in mixtures.items()
        }
        save_composition(folder, parts, self.config, self.sources, learned, self.facts)


def check_representable(mixtures: dict[str, Mixture], max_rank: int) -> None:
    """Raises UserError when the sum will have no exact plain LoRA and no rank to cut it to was given."""
    full = [name for name, mixture in mixtures.items() if mixture.dense is not None]
    if full and not max_rank:
        raise UserError(
            f"An adapter changes {full[0]} by a matrix of full rank, so the sum is not a plain LoRA: give --max-rank to cut it."
        )
