"""What every training run has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from ...toolkit.core.paths import expand_paths

# Settings whose default is the base's own (defaults.py): None as long as nobody has set them. Type checkers see what they are once
# `resolve_defaults` has filled them in, which is before anything but the checks reads them.
Precision = Literal["fp32", "bf16", "fp16"]
if TYPE_CHECKING:
    AutoInt: TypeAlias = int
    AutoFloat: TypeAlias = float
    AutoBool: TypeAlias = bool
    AutoPrecision: TypeAlias = Precision
else:
    AutoInt, AutoFloat, AutoBool, AutoPrecision = int | None, float | None, bool | None, Precision | None
AUTO: Any = None


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training run has: steps, optimizer, logging, checkpoints."""

    unused_parameters: ClassVar[bool] = False
    """Whether a step may leave parameters out, which several processes must know of."""
    samples: ClassVar[str] = "images"
    """What the samples of a batch are, for the progress line to count."""

    out: Path = Path("runs/subject")
    """Run folder."""
    steps: Annotated[int, Ge(1), Le(1_000_000_000)] = 300
    """Optimizer steps."""
    batch_size: Annotated[AutoInt, Ge(1), Le(65_536)] = AUTO
    """Images per forward pass, over all processes together; unset: the base's own."""
    gradient_accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[AutoFloat, Gt(0)] = AUTO
    """Peak learning rate of the adapter; unset: the base's own, or the optimizer's."""
    lr_scheduler: str = "constant"
    """A scheduler of diffusers: constant, constant_with_warmup, linear, cosine, polynomial, ..."""
    lr_warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises from 0."""
    optimizer: str = "AdamW"
    """Name of a class in torch.optim, or AdamW8bit, Lion8bit, Prodigy (learning rate 1), AdamWScheduleFree."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Decay of the moving average of the adapter's weights (0.99 to 0.9999); 0 keeps none."""
    precision: AutoPrecision = AUTO
    """dtype of the base model, unset: the base's own on this device; the adapter itself is always trained in fp32."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Quantization of the base model's linear layers in memory, text encoders included."""
    gradient_checkpointing: AutoBool = AUTO
    """Less memory, about a third more time; unset: with large bases."""
    compile: bool = False
    """Compile the denoiser's repeated blocks (torch.compile): the first steps take minutes, the others less; needs a C++ compiler."""
    seed: Annotated[int, Ge(0)] = 0
    """Same seed, same result."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between lines of metrics.jsonl; the device is not waited for in between."""
    checkpoint_every: Annotated[int, Ge(1)] = 100
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept."""
    preview_every: Annotated[int, Ge(0)] = 100
    """Steps between previews, the last of which is of the last step; 0 makes none."""
    export: tuple[str, ...] = ()
    """Formats that the adapter is also written in when the run is done, as `rankfold export` does: diffusers, kohya, comfyui, peft, ..."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also log to this tracker, through accelerate."""
    threads: Annotated[int, Ge(0)] = 0
    """Torch threads on a CPU; 0 takes as many as find a core that no other process keeps busy when the run starts."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, expand_paths(value))
