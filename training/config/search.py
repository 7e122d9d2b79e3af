"""Settings of structure searches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from .images import DiffusionConfig
from .instruct import ConversationConfig, Part


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """How the search is run."""

    population: int = 50
    """Structures of each generation."""
    generations: int = 20
    """Generations after the first, random one."""
    parents: int = 10
    """Best structures so far that the next generation comes from."""
    mutations: int = 25
    """Children that are a parent with some genes redrawn."""
    mutation_rate: float = 0.2
    """Fraction of genes that a mutation redraws."""
    crossovers: int = 25
    """Children that take each gene from either of two parents."""
    tries: int = 10
    """Draws for each child before it is brought below the limit by force."""
    search_seed: int = 0
    """Seed of the search."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings(EvolutionConfig):
    """The space of GLoRA structures that is searched (Chavan et al. 2023, arXiv 2306.07967)."""

    rank: Annotated[int, Ge(1)] = 4
    """Rank of the low-rank choices."""
    form: Literal["matmul", "elementwise"] = "matmul"
    """How A meets the weight: matmul (folds into LoRA), elementwise (the released code)."""
    a_rate: Annotated[float, Gt(0)] = 1.0
    """Factor on the learning rate of A."""
    choices_a: tuple[str, ...] = ("lora", "vector", "constant", "none")
    """Choices of the weight scale A."""
    choices_b: tuple[str, ...] = ("lora", "vector", "constant", "none")
    """Choices of the weight shift B."""
    choices_c: tuple[str, ...] = ("lora", "vector", "none")
    """Choices of the prompt C."""
    choices_d: tuple[str, ...] = ("vector", "constant", "none")
    """Choices of the bias scale D."""
    choices_e: tuple[str, ...] = ("vector", "constant", "none")
    """Choices of the bias shift E."""
    limit: Annotated[int, Ge(0)] = 0
    """Maximum parameters of a structure; 0 means as many as plain LoRA of this rank has on the same layers."""
    largest_every: Annotated[int, Ge(0)] = 0
    """Steps between trainings of the largest structure (sandwich rule); 0 trains random ones only."""
    held_out_share: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of the data that structures are judged on, and that is then not trained on; at least one row."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DiffusionConfig, SearchSettings):
    """Searches each layer's own GLoRA structure: a supernet is trained, then structures are bred and judged on held-out images."""

    unused_parameters: ClassVar[bool] = True

    out: Path = Path("runs/search")
    """Run folder."""
    steps: Annotated[int, Ge(1)] = 1000
    """Optimizer steps of the supernet."""
    target_modules: tuple[str, ...] = ()
    """Names of the denoiser's layers; unset means its attention layers."""
    train_text_encoder: bool = False
    """Search the text encoders' layers too."""
    text_target_modules: tuple[str, ...] = ()
    """Names of the text encoders' layers; unset means their attention layers."""
    held_out: Path | None = None
    """Folder with the images that structures are judged on, instead of a share of --images."""
    held_out_draws: Annotated[int, Ge(1)] = 32
    """Noise and timesteps drawn once for each held-out image."""


@dataclass(frozen=True, kw_only=True)
class InstructSearchConfig(ConversationConfig, SearchSettings):
    """Searches each layer's own GLoRA structure for a vision-language task, judged on held-out conversations."""

    out: Path = Path("runs/search-instruct")
    """Run folder."""
    steps: Annotated[int, Ge(1)] = 1000
    """Optimizer steps of the supernet."""
    target_parts: tuple[Part, ...] = ("language-attention", "language-mlp")
    """Parts whose linear layers are searched."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, instead of --target-parts."""
    held_out: Path | None = None
    """Conversations that structures are judged on, instead of a share of --data."""
