"""Which adapter, and where it attaches to a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from .base import AUTO, AutoFloat, AutoInt


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which adapter."""

    adapter: str = "moslora"
    """Adapter method, see 'rankfold adapters'."""
    rank: Annotated[AutoInt, Ge(1), Le(4096)] = AUTO
    """Rank of the low-rank update; unset: the base's own."""
    alpha: Annotated[AutoFloat, Gt(0)] = AUTO
    """The change is multiplied by alpha / rank; unset: the rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input."""
    adapter_options: dict[str, str] = field(default_factory=dict)
    """Options of the method, as in: --adapter-options mixer=frozen."""
    lora_plus_ratio: Annotated[float, Gt(0)] = 1.0
    """Factor on the learning rate of the up matrices (LoRA+, Hayou et al. 2024, arXiv 2402.12354); 4 to 16 is usual."""


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapterSettings(AdapterSettings):
    """Where it attaches to a diffusion model."""

    target_modules: tuple[str, ...] = ()
    """Names of the denoiser's layers to adapt; unset means its attention layers."""
    blocks: str = ""
    """Adapt the layers of these blocks only: a preset of the family (SDXL: style, subject), or a regular expression on their names."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank by layers, as regular expressions that match whole names: --rank-pattern "mid_block.*" 32; alpha follows."""
    lr_pattern: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate by layers, as for --rank-pattern."""
    train_text_encoder: bool = False
    """Adapt the text encoders too."""
    text_target_modules: tuple[str, ...] = ()
    """Names of the text encoders' layers to adapt; unset means their attention layers."""
    num_vectors: Annotated[int, Ge(0)] = 0
    """Textual inversion: number of learned vectors that the token gets, trained with the adapter; 0 learns none."""
    text_learning_rate: Annotated[float, Gt(0)] | None = None
    """Learning rate of the text encoders' adapters and of the token's vectors; unset: the base's own."""
