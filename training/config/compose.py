"""Several adapters as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from .base import AutoFloat, LoopConfig
from .images import DiffusionConfig
from .instruct import ConversationConfig


@dataclass(frozen=True, kw_only=True)
class ComposeSettings:
    """How one adapter is made of several (learned weights: arXiv 2402.15414)."""

    adapters: tuple[str, ...] = ()
    """Run folders, adapter folders, LoRA files, or names in the library."""
    weights: tuple[float, ...] = ()
    """Fixed weights, one for each adapter; unset means learned if there is something to learn from, and otherwise alike (1 / N)."""
    tie: Literal["column", "layer", "block", "global"] = "layer"
    """Learned weights of their own for each layer, each block, or one set for the whole model; column: factors for every column of every
    adapter's change in every layer (ZipLoRA, arXiv 2311.13600), 1 at the start."""
    column_penalty: Annotated[float, Ge(0)] = 0.01
    """With --tie column: weight of the penalty on columns that several adapters use, 0.01 in the paper."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Learned weights are softmax(v / temperature)."""
    free: bool = False
    """Learned weights are v itself, neither positive nor summing to 1."""
    max_rank: Annotated[int, Ge(0)] = 0
    """Cut the sum to this rank, layer by layer, and print the error; 0 keeps it exact, at the sum of the ranks."""
    ignore_unused: bool = False
    """Use LoRA files although they hold tensors that the base has no place for; they are named and left out."""
    merge: str | None = None
    """Merge by a method of PEFT instead: linear, svd, ties, dare_linear, dare_ties, magnitude_prune, ..."""
    density: Annotated[float, Gt(0)] = 0.5
    """Share of the values that the pruning methods of --merge keep."""


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(DiffusionConfig, ComposeSettings):
    """Makes one adapter of several; with images, learns how much of each to take in every layer."""

    out: Path = Path("runs/composed")
    """Run folder."""
    learning_rate: Annotated[AutoFloat, Gt(0)] = 1e-3
    """Peak learning rate of the weights."""
    preservation_weight: Annotated[float, Ge(0)] = 0.0
    """Not for composing: what it could preserve is already in its sources."""


@dataclass(frozen=True, kw_only=True)
class ComposeInstructConfig(ConversationConfig, ComposeSettings):
    """Makes one adapter of several of a vision-language model; with conversations, learns how much of each to take in every layer."""

    out: Path = Path("runs/composed-instruct")
    """Run folder."""
    learning_rate: Annotated[AutoFloat, Gt(0)] = 0.05
    """Peak learning rate of the weights."""


def has_fixed_weights(config: LoopConfig) -> bool:
    """Whether it is a composition that has nothing to learn its weights from."""
    return (isinstance(config, ComposeConfig) and config.images is None) or (
        isinstance(config, ComposeInstructConfig) and config.data is None
    )
