"""What every stage of building the embedded models shares: settings, drawn images, the small training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import nn


@dataclass(frozen=True, kw_only=True)
class BuildTinyConfig:
    """Builds the embedded models from drawn images (about four hours on two cores)."""

    out: Path = Path("assets/tiny")
    """Folder of the finished models."""
    work: Path = Path("runs/build-tiny")
    """Folder of images, latents and curves; may be deleted afterwards."""
    images: Annotated[int, Ge(1)] = 60_000
    """Number of drawn training images."""
    creature_pairs: Annotated[int, Ge(1)] = 20_000
    """Number of creatures drawn twice, for the CLIP model's sense of identity."""
    vae_steps: Annotated[int, Ge(1)] = 10_000
    clip_steps: Annotated[int, Ge(1)] = 1_200
    unet_steps: Annotated[int, Ge(1)] = 9_000
    """Steps of each of the denoiser's two rounds."""
    dit_steps: Annotated[int, Ge(1)] = 12_000
    """Steps of the flow transformer."""
    turbo_prompts: Annotated[int, Ge(1)] = 7_000
    """Number of prompts on which the flow transformer is followed to be distilled."""
    turbo_steps: Annotated[int, Ge(1)] = 700
    """Steps of its distillation."""
    edit_rows: Annotated[int, Ge(1)] = 8_000
    """Number of things and creatures that the model with references learns from, each drawn with its edits."""
    kontext_steps: Annotated[int, Ge(1)] = 2_200
    """Steps of the model with references."""
    vlm_images: Annotated[int, Ge(1)] = 80_000
    """Number of images that the vision-language model is asked about, in each of two rounds."""
    vlm_steps: Annotated[int, Ge(1)] = 8_000
    """Its steps in each round."""
    seed: Annotated[int, Ge(0)] = 0
    stages: tuple[str, ...] = (
        "pictures",
        "judge",
        "vae",
        "clip",
        "draft",
        "unet",
        "dit",
        "turbo",
        "edits",
        "kontext",
        "vlm-draft",
        "vlm",
    )
    """Stages to run; each needs the ones before it (clip needs only the images, vlm-draft nothing)."""
    threads: Annotated[int, Ge(1)] = 2
    """Torch threads."""


def log_values(config: BuildTinyConfig, **values: object) -> None:
    """Prints a line and appends it to the curves."""
    print(json.dumps(values), flush=True)
    with (config.work / "curves.jsonl").open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values) + "\n")


def load_images(config: BuildTinyConfig) -> torch.Tensor:
    """The drawn images, uint8 (N, 3, 64, 64)."""
    return torch.from_numpy(np.load(config.work / "pictures.npy")).permute(0, 3, 1, 2).contiguous()


def to_pixels(bytes_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float (B, C, H, W) in [-1, 1]."""
    return bytes_BCHW.float() / 127.5 - 1


def shuffled_batches(n: int, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Index batches over shuffled passes of n rows."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    at = 0
    for _ in range(steps):
        if at + batch > n:
            order, at = torch.randperm(n, generator=generator), 0
        yield order[at : at + batch]
        at += batch


def fit(
    config: BuildTinyConfig,
    name: str,
    parameters: list[nn.Parameter],
    batches: Iterator[torch.Tensor],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    steps: int,
    lr: float,
    bf16: bool,
    after: Callable[[int], None] = lambda step: None,
    every: int = 100,
) -> None:
    """AdamW with warm-up and cosine decay; `after(step)` runs after every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    warm = max(1, min(200, steps // 20))
    total, start = 0.0, time.time()
    for step, rows in enumerate(batches, 1):
        rate = lr * min(step / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        after(step)
        if step % every == 0:
            log_values(
                config, stage=name, step=step, loss=round(total / every, 5), seconds=round(time.time() - start, 1)
            )
            total = 0.0


def load_as_fp32(folder: Path) -> None:
    """Notes fp32 in the config beside fp16 weights: transformers loads what the config says, diffusers always fp32, and the
    two halves of a pipeline must agree when nobody names a dtype.
    """
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}, indent=2), encoding="utf-8"
    )


def copy_average(average: Any, learner: nn.Module, shadow: nn.Module) -> None:
    """Gives `shadow` the weights that an EMAModel has averaged of `learner`, and the learner's buffers."""
    average.store(learner.parameters())
    average.copy_to(learner.parameters())
    shadow.load_state_dict(learner.state_dict())
    average.restore(learner.parameters())
