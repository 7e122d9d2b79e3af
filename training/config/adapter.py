"""Which adapter, and where it attaches to a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which adapter."""

    adapter: str = "moslora"
    """Adapter variant, see 'rankfold adapters'."""
    rank: Annotated[int, Ge(1)] = 8
    """Width of the bottleneck."""
    alpha: Annotated[float, Gt(0)] = 8.0
    """The change is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input."""
    adapter_options: dict[str, str] = field(default_factory=dict)
    """Fields of the variant's own config, as in: --adapter-options mixer frozen."""
    lora_plus_ratio: Annotated[float, Gt(0)] = 1.0
    """Up-factors learn so many times faster than the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354); 4 to 16 is usual."""


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapterSettings(AdapterSettings):
    """Where it attaches to a diffusion model."""

    target_modules: tuple[str, ...] = ()
    """Names of the denoiser's layers to adapt; unset means its attention layers."""
    train_text_encoder: bool = False
    """Adapt the text encoders too."""
    text_target_modules: tuple[str, ...] = ()
    """Names of the text encoders' layers to adapt; unset means their attention layers."""
    token_vectors: Annotated[int, Ge(0)] = 0
    """The token becomes a new word of so many vectors, learned beside the adapter; 0 leaves it as the text encoders have it."""
    text_learning_rate: Annotated[float, Gt(0)] | None = None
    """Learning rate of the text encoders' adapters and of the token's vectors; unset means the same."""
