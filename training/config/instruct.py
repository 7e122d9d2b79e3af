"""Visual instruction tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from .adapter import AdapterSettings
from .base import LoopConfig

Part = Literal["language-attention", "language-mlp", "vision-attention", "vision-mlp", "projector"]


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(LoopConfig):
    """What every training on conversations about images has (visual instruction tuning, Liu et al. 2023, arXiv 2304.08485)."""

    unused_parameters: ClassVar[bool] = True  # rows without an image use no part of the tower
    samples: ClassVar[str] = "samples"

    out: Path = Path("runs/instruct")
    """Run folder."""
    data: Path | None = None
    """Conversations: LLaVA JSON, ShareGPT, chat messages or questions, as .json, .jsonl, .parquet or a data-set folder."""
    images: Path | None = None
    """Folder that the images' paths start from; unset means the data file's own."""
    split: str = ""
    """Which split of a folder that holds several, such as train."""
    columns: tuple[str, ...] = ()
    """Columns of the data under other names, each as OURS=THEIRS: question=Frage answer=Antwort, or ignore=THEIRS to leave one out."""
    learn_turns: Literal["all", "last", "marked"] = "all"
    """Answers that are learned: all, the last, or those whose turn has a loss, train or weight that is not 0; marks of 0 hold for all."""
    base: str = "tiny-vlm"
    """Base model: 'tiny-vlm' (embedded), a folder, or a hub id such as llava-hf/llava-1.5-7b-hf."""
    chat_template: Path | None = None
    """File with a chat template instead of the base's own."""
    pad_to_square: bool = False
    """Give images borders in the processor's mean colour, so that one that crops cuts nothing off; LLaVA-1.5 was trained so."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation."""
    epochs: Annotated[float, Gt(0), Le(1_000_000)] | None = None
    """Passes over the data, instead of --steps."""
    more_data: tuple[str, ...] = ()
    """More data to learn from, each as FILE or FILE=SHARE: so many times its rows are seen in a pass over --data (2, or 0.5)."""
    replay: Path | None = None
    """More conversations, of what the base can do already and shall keep."""
    replay_share: Annotated[float, Ge(0), Lt(1)] = 0.25
    """Fraction of samples that come from --replay."""
    skip_bad: bool = False
    """Leave out rows that cannot be used instead of stopping."""
    max_left_out: Annotated[float, Ge(0), Le(1)] = 0.8
    """Share of the data that may be left out, as too long or as bad; more stops the run."""
    max_pixels: Annotated[int, Ge(1)] | None = None
    """Most pixels that an image is given to the base with; larger ones are scaled down as its processor does; unset means its limit."""
    min_pixels: Annotated[int, Ge(1)] | None = None
    """Fewest pixels; smaller images are scaled up."""
    video_frames: Annotated[int, Ge(1)] | None = None
    """Most frames of a video that the base is given, evenly; unset means its own rule, and all where a row gives frames."""
    max_length: Annotated[int, Ge(16)] = 2048
    """Maximum tokens per sample, image tokens included; longer samples are left out."""
    truncate: bool = False
    """Truncate longer samples to the exchanges that fit, from the first; an image is never cut."""
    group_by_length: bool = True
    """Batch samples of similar length, so that little is padding."""
    packing: bool = False
    """Pack a batch's samples into one sequence without attention between them, so that no padding is computed."""
    workers: Annotated[int, Ge(0)] = 2
    """Data loader workers; 0 loads in the main process."""
    preview_rows: Annotated[int, Ge(0)] = 4
    """Rows whose first question is answered in previews."""
    preview_tokens: Annotated[int, Ge(1)] = 64
    """Maximum tokens of such an answer."""


@dataclass(frozen=True, kw_only=True)
class InstructConfig(ConversationConfig, AdapterSettings):
    """Teaches a vision-language model a task from images with questions and answers."""

    target_parts: tuple[Part, ...] = ("language-attention", "language-mlp")
    """Parts whose linear layers get the adapter."""
    vision_alpha: Annotated[float, Gt(0)] | None = None
    """Alpha of the vision tower's layers; unset means --alpha."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, instead of --target-parts."""
    train_projector: bool = False
    """Train the projector between tower and language model in full, as LLaVA does."""
    projector_learning_rate: Annotated[float, Gt(0)] | None = None
    """Learning rate of the projector, trained in full or by the adapter; unset means --learning-rate."""
    vision_learning_rate: Annotated[float, Gt(0)] | None = None
    """Learning rate of the vision tower's layers; unset means --learning-rate."""
    freeze: tuple[str, ...] = ()
    """Layers that get no adapter, by parts of their names, as vision_tower.layers.0 or k_proj."""
    start_from: Path | None = None
    """Adapter of the same kind, rank and layers that the training goes on from: a run, an adapter folder, a PEFT folder."""
    evaluate_every: Annotated[int, Ge(0)] = 0
    """Steps between measurements on held-out data: the loss of their answers, and answers that are scored; 0 makes none."""
    evaluate_data: Path | None = None
    """Conversations to measure by; unset means one row in ten of --data, which is then not trained on."""
    evaluate_answers: Annotated[int, Ge(0)] = 64
    """Questions of these that are asked and scored at each measurement; 0 measures the loss alone."""
    keep: Literal["last", "best"] = "last"
    """Which step's adapter becomes the run's; best needs --evaluate-every."""
    patience: Annotated[int, Ge(0)] = 0
    """Stop after this many measurements without significant improvement; 0 never does."""
    shard_base: bool = False
    """Shard the frozen language model over the devices (FSDP2) instead of replicating it."""
