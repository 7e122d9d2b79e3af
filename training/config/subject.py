"""Subject-driven training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from .adapter import DiffusionAdapterSettings
from .images import DiffusionConfig

NO_PROMPTS = "none"  # as --evaluate-prompts: the validation loss alone is measured, without an image drawn


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(DiffusionConfig, DiffusionAdapterSettings):
    """Teaches a diffusion model a subject, or several, from a few images."""

    start_from: Path | None = None
    """Go on from this adapter: a run, a folder, or a LoRA file of any tool; its layers, ranks and alphas stay."""
    training_adapter: Path | None = None
    """Of distilled bases (turbo, schnell): an adapter that undoes the distillation; merged while training, and nowhere else."""
    target_guidance: Annotated[float, Gt(0)] = 1.0
    """Of bases into which guidance is distilled: guidance that the target is given, about as much as was distilled; 1 is the plain loss."""
    preview_base: str = ""
    """A sibling of the base, such as its distilled one, that previews and measured images are drawn with, by its own steps and guidance."""
    references: tuple[Path, ...] = ()
    """Folders of reference images, each called as the image that is made from it; or metadata.jsonl in --images says them."""
    reference_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of the batches that are trained without references."""
    also: dict[str, str] = field(default_factory=dict)
    """More subjects for the same adapter, token and class noun before the folder: --also "sks2 cat" photos/cat."""
    evaluate_every: Annotated[int, Ge(0)] = 0
    """Steps between measurements of likeness, prompt fidelity and validation loss; 0 makes none."""
    evaluate_images: Path | None = None
    """Photos that likeness is measured by; unset means one in five of --images, which is then not trained on."""
    hold_out: tuple[str, ...] = ()
    """Names of the photos that are held out, instead of one in five."""
    evaluate_prompts: str = ""
    """object, live, world, or a file, as in `rankfold evaluate`; unset means world for embedded bases and object for others; none draws no
    images and measures the validation loss alone, which --patience and --keep best then go by."""
    evaluate_clip: str = ""
    """An open_clip model (MODEL:WEIGHTS, hf-hub:... or local-dir:...); unset means the embedded one for embedded bases."""
    keep: Literal["last", "best"] = "last"
    """Which step's adapter becomes the run's; best needs --evaluate-every."""
    patience: Annotated[int, Ge(0)] = 0
    """Stop after this many measurements without significant improvement; 0 never does."""
    shard_base: bool = False
    """Shard the frozen denoiser over the devices (FSDP2) instead of replicating it."""
    blocks_to_swap: Annotated[int, Ge(0)] | Literal["all"] = 0
    """Frozen blocks of the denoiser that wait in main memory and are copied to the GPU when they are at work: a number, or all."""

    @property
    def drawing_base(self) -> str:
        return self.preview_base or self.base

    @property
    def subjects(self) -> dict[str, str]:
        more = [name.strip().split(None, 1) for name in self.also]
        return super().subjects | {token: noun for token, noun in more}
