"""Composition: one adapter of several, by fixed weights, by weights learned on a few images, or by PEFT's merges."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...toolkit.adapters import composition
from ...toolkit.adapters.composition import MixingCoefficients, Mixture
from ...toolkit.adapters.fold import Folded
from ...toolkit.core.errors import UserError
from ...toolkit.core.files import write_text
from ...toolkit.core.run_folder import Run
from ...toolkit.diffusion import textual_inversion as new_words
from ...toolkit.diffusion.load import EMBEDDED, open_model, resolve_base
from ...toolkit.diffusion.model import DTYPES
from ...toolkit.formats import native
from ...toolkit.formats.peft_merge import check_merge, peft_merge
from ...toolkit.formats.source import AdapterSource, adapter_facts, adapter_path, content_hash, load_source
from ...toolkit.formats.write import Part, peft_state
from ...toolkit.vlm.model import EMBEDDED as EMBEDDED_VISION
from ..config.checks import check_ranges
from ..config.compose import ComposeConfig, ComposeSettings
from ..runs import library
from ..runs.begin import prepare_folder, restore_previous
from ..subject.images import DiffusionTask

# ---------------------------------------------------------------------------------------------- checks


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
        check_base(text, adapter_facts(place).get("base", ""), wanted, base, resolve)


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
        return resolve(base) == wanted
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------- fixed weights


def compose_fixed(config: ComposeConfig, keep: Collection[str] = ()) -> Run:
    """The sum by fixed weights, or PEFT's merge, as a run folder with an adapter.

    but: entries of the folder that stay.

    Raises:
        UserError: for adapters that do not fit, and as `check_compose` does.
    """
    base = check_fixed(config)
    return write_composition(config, lambda: open_model(base, DTYPES[config.precision]), config.facts, keep)


def check_fixed(config: ComposeConfig) -> str:
    """All checks of a composition by fixed weights that need no model; returns the base's folder."""
    check_ranges(config)
    check_compose(config)
    return resolve_base(config.base)


def write_composition(
    config: Any,
    open_base: Callable[[], Any],
    facts: dict[str, Any],
    keep: Collection[str],
    finish: Callable[[Path], None] = lambda folder: None,
) -> Run:
    """A run folder with the sum, or PEFT's merge, of checked adapters.

    facts: what its adapter says of itself; but: entries of the folder that stay; finish: writes more into the adapter's folder.
    """
    run = Run(config.out)
    prepare_folder(run, config, keep)
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
        state, error = "done", None
    except Exception as fault:
        error = str(fault)
        raise
    finally:
        if state == "done" or not restore_previous(run, keep):
            run.set_status(state=state, step=0, total=0, error=error)
    return run


def load_sources(config: ComposeSettings, model: Any) -> list[AdapterSource]:
    """The adapters as changes of this model's layers."""
    return [load_source(library.resolve(text), model, Path(text).name) for text in config.adapters]


def merge_source_tokens(sources: Sequence[AdapterSource]) -> dict[str, torch.Tensor]:
    """The words that the sources bring."""
    return new_words.merge_token_embeddings([(source.name, source.token_embeddings) for source in sources])


def changed_parts(sources: Sequence[AdapterSource]) -> list[str]:
    """Parts of the pipeline that any source changes."""
    return [part for part in native.PARTS if any(part in source.parts for source in sources)]


# ---------------------------------------------------------------------------------------------- learned weights


class CompositionMixin:
    """What every Task of learning weights has: the sources on the model's parts, and their weights, which alone are trained.

    A sub-class also is a Task on data.
    """

    config: Any

    def attach_sources(self, model: Any) -> dict[str, nn.Module]:
        """Puts the sources on a model with the attributes native.PARTS, alike at the start; returns its changed parts."""
        config = self.config
        self.sources = load_sources(config, model)
        weights_of = composition.coefficient_factory(
            config.tie, lambda: MixingCoefficients(len(self.sources), temperature=config.temperature, free=config.free)
        )
        self.mixtures: dict[str, dict[str, Mixture]] = {}
        for part in changed_parts(self.sources):
            module = getattr(model, part).requires_grad_(False)
            folded = [source.parts.get(part, {}) for source in self.sources]
            named = lambda name, part=part: weights_of(f"{part}.{name}")  # noqa: E731
            self.mixtures[part] = composition.attach_sources(module, folded, named)
            check_representable(self.mixtures[part], config.max_rank)
        layers = sum(len(mixtures) for mixtures in self.mixtures.values())
        scalars = sum(weights.logits.numel() for weights in self.coefficients())
        print(f"Learning {scalars} weights: {len(self.sources)} adapters, {layers} layers, weights by {config.tie}")
        self.composed_parts = {part: getattr(model, part) for part in self.mixtures}
        return self.composed_parts

    def facts(self) -> dict[str, Any]:
        """What the adapter says of itself."""
        raise NotImplementedError

    def coefficients(self) -> list[MixingCoefficients]:
        """The sets of weights, each once."""
        return list(
            {id(m.coefficients): m.coefficients for part in self.mixtures.values() for m in part.values()}.values()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weights' logits."""
        return [{"params": [weights.logits for weights in self.coefficients()], "lr": self.config.learning_rate}]

    def is_dead(self) -> bool:
        """Never: the sources are trained already."""
        return False

    def save_adapter(self, folder: Path) -> None:
        """Writes the sum as an ordinary adapter."""
        parts = {
            part: Part(self.composed_parts[part], composition.weighted_sums(mixtures), "")
            for part, mixtures in self.mixtures.items()
        }
        learned = {
            f"{part}.{name}": [round(w, 5) for w in mixture.coefficients().tolist()]
            for part, mixtures in self.mixtures.items()
            for name, mixture in mixtures.items()
        }
        save_composition(folder, parts, self.config, self.sources, learned, self.facts())


class ComposeTask(CompositionMixin, DiffusionTask):
    """The Task of learning the weights on a few images; all else is frozen."""

    config: ComposeConfig

    def attach(self) -> dict[str, nn.Module]:
        """Puts the sources on the model, and the words they bring."""
        parts = self.attach_sources(self.model)
        self.token_embeddings = merge_source_tokens(self.sources)
        if self.token_embeddings:
            new_words.add_tokens_to_pipeline(self.model.text_pipeline(), self.token_embeddings)
        return parts

    def facts(self) -> dict[str, str]:
        return self.config.facts


def check_representable(mixtures: dict[str, Mixture], max_rank: int) -> None:
    """Raises UserError when the sum will have no exact plain LoRA and no rank to cut it to was given."""
    full = [name for name, mixture in mixtures.items() if mixture.dense is not None]
    if full and not max_rank:
        raise UserError(
            f"An adapter changes {full[0]} by a matrix of full rank, so the sum is not a plain LoRA: give --max-rank to cut it."
        )


# ---------------------------------------------------------------------------------------------- the result


def save_composition(
    folder: Path,
    parts: dict[str, Part],
    config: ComposeSettings,
    sources: Sequence[AdapterSource],
    weights: dict[str, list[float]],
    facts: dict[str, Any],
) -> None:
    """Writes an ordinary LoRA adapter, with the names, hashes and weights of what it was made of. facts: what else it says.

    Raises:
        UserError: for changes of full rank without a rank to cut them to.
    """
    error = 0.0
    for name, part in parts.items():
        folded, cut_error = truncate_part(part, config.max_rank)
        error = max(error, cut_error)
        state, lora = peft_state(Part(part.model, folded, ""))
        (folder / name).mkdir(parents=True, exist_ok=True)
        native.write_state(folder / name, state, lora)
    if words := merge_source_tokens(sources):
        new_words.save_token_embeddings(folder, words)
    facts = facts | {"adapter": "lora"}
    facts["composed_of"] = json.dumps([{"name": source.name, "hash": source.hash} for source in sources])
    facts["composed_how"] = config.merge or "weighted sum"
    facts["composed_weights"] = json.dumps(weights)
    facts["composed_cut_error"] = f"{error:.4f}"
    write_text(folder / "rankfold.json", json.dumps(facts, indent=1))


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
