"""What a run will take, before any weight is loaded: its step is carried out on tensors that have shapes and no numbers.

Models are built from their configs alone (torch's FakeTensorMode), adapters put on them as in training, and one step after
another is run while every allocation is counted. So the estimate knows the real architecture, checkpointing, the adapter's own
working memory and the optimizer's, and needs no table that could go stale.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ..toolkit import devices
from ..toolkit.adapters.attach import adapter_layers, drop_unused, trainable
from ..toolkit.data.subjects import find_samples
from ..toolkit.errors import UserError
from ..toolkit.models.base import DTYPES, PictureModel, Words
from ..toolkit.models.diffusion import open_model, resolve_base
from ..toolkit.models.quantise import linears
from .adapter_config import adapter_config
from .config import SubjectConfig
from .counting import Known, Live
from .denoising import DenoisingLoss, attach_to_parts, weighing
from .pictures import KEPT_EVERY

QUANTISED = {
    "nf4": 0.5 + 4 / 64,
    "int8": 1 + 4 / 1024,
    "fp8": 1 + 4 / 1024,
}  # bytes a weight, with its share of the scales
STATES = {"AdamW": 2, "Adam": 2, "AdamW8bit": 0.5, "Lion8bit": 0.25, "Prodigy": 4, "AdamWScheduleFree": 2, "SGD": 0}


@dataclass(frozen=True)
class Step:
    """What does not hang on the optimizer, nor on the frozen weights' number of bits."""

    frozen: dict[str, int]
    """Bytes of the frozen model by --quantize."""
    largest: int
    """Bytes of the largest layer's weight as it is multiplied with."""
    alive: int
    """Bytes alive beside weights and gradients at the peak."""
    parameters: int
    """Trained numbers."""
    flops: int
    """Operations of one pass forward and back."""


@dataclass(frozen=True)
class Plan:
    """Bytes, and what they are for."""

    config: SubjectConfig
    step: Step

    @property
    def base(self) -> int:
        """The frozen model in the number format of the run."""
        return self.step.frozen[self.config.quantize]

    @property
    def adapter(self) -> int:
        """The adapter, its gradient and the optimizer's state."""
        return int(self.step.parameters * 4 * (2 + STATES.get(self.config.optimizer, 2)))

    @property
    def working(self) -> int:
        """What a step has alive beside these at its peak; a layer in few bits is dequantised while it works."""
        return self.step.alive + (self.step.largest if self.config.quantize != "none" else 0)

    @property
    def peak(self) -> int:
        """Memory of the device at the peak of a step."""
        return self.base + self.adapter + self.working

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return self.step.parameters

    @property
    def flops(self) -> int:
        """Operations of one optimizer step."""
        return self.step.flops * self.config.gradient_accumulation

    def under(self, change: dict[str, Any]) -> Plan:
        """The plan with other settings; a step is carried out anew only where it would be another."""
        other = replace(self.config, **change)
        return Plan(other, self.step if change.keys() <= {"optimizer", "quantize"} else step_of(other))


def plan(config: SubjectConfig) -> Plan:
    """What a step of this run takes.

    Raises:
        UserError: for a base or settings that cannot work.
    """
    return Plan(config, step_of(config))


def step_of(config: SubjectConfig) -> Step:
    """A step carried out on tensors without numbers.

    Raises:
        UserError: for a base or settings that cannot work.
    """
    model = open_model(resolve_base(config.base), DTYPES[config.precision], "meta")
    side = config.resolution or model.native_resolution
    model.check_side(side, "--resolution")
    parts = attach_to_parts(model, config, lambda targets: adapter_config(config, targets))
    if config.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    held = [getattr(model, name) for name in (model.text_encoders() if config.train_text_encoder else [])]
    frozen = {kind: sum(frozen_bytes(part, kind) for part in {model.denoiser, *held}) for kind in ("none", *QUANTISED)}
    alive, flops = step_peak(model, parts, config, side)
    for part in parts.values():
        drop_unused(part)
    numbers = sum(parameter.numel() for part in parts.values() for parameter in trainable(part))
    dense = (layer.weight.numel() for layer in linears(model.denoiser).values())
    largest = max(dense, default=0) * model.dtype.itemsize
    return Step(frozen, largest, alive, numbers, flops)


def step_peak(model: PictureModel, parts: dict[str, nn.Module], config: SubjectConfig, side: int) -> tuple[int, int]:
    """Bytes alive at the peak of a forward and backward pass, beside weights and the adapter's gradients; operations of the pass."""
    rows, scale = config.batch_size, model.latent_scale
    model.text_pipeline()  # whose scheduler wants real numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in {*parts.values(), *(getattr(model, name) for name in model.text_encoders())}:
            part.to_empty(device="cpu")
        model.device = torch.device("cpu")
        shape = (rows, model.latent_channels, side // scale, side // scale)
        batch = {key: torch.zeros(shape) for key in ("mean", "std", "spread", "noise")}
        batch |= {"levels": torch.ones(rows) * 0.5, "prompt": torch.arange(rows), "weight": torch.ones(rows)}
        if not model.flow:
            batch["levels"] = torch.ones(rows, dtype=torch.long)
        return counted(model, parts, config, batch)


def counted(
    model: PictureModel,
    parts: dict[str, nn.Module],
    config: SubjectConfig,
    batch: dict[str, torch.Tensor],
) -> tuple[int, int]:
    """Peak of one pass on fake tensors, less the gradients, which are counted with the adapter; and its operations."""
    noise = model.noise(config.timestep_sampling, config.timestep_shift)
    if config.preservation_weight:
        kept = torch.arange(0, len(batch["mean"]), KEPT_EVERY)
        batch |= {"kept": kept, "kept_prompt": kept, "kept_weight": torch.ones(len(kept))}

    prompt = longest_prompt(config)
    with torch.no_grad(), Known():
        words = model.words([prompt] * (2 * len(batch["mean"])))

    def words_of(numbers: torch.Tensor) -> Words:
        if config.train_text_encoder:
            return model.words([prompt] * len(numbers))
        return {name: value[: len(numbers)] for name, value in words.items()}

    module = DenoisingLoss(model, parts, noise, words_of, weighing(config)).train()
    before = [*module.parameters(), *module.buffers(), *batch.values(), *words.values()]
    try:
        with Live(before) as live, Known():
            module(batch).mean().backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = model.index["_class_name"] + (" with trained text encoders" if config.train_text_encoder else "")
        raise UserError(
            f"A {kind} works as its prompts' numbers say, so its step cannot be planned without them."
        ) from error
    layers = [layer for part in parts.values() for layer in adapter_layers(part).values()]
    gradients = sum(p.numel() * 4 for layer in layers for p in trainable(layer))
    return live.peak - gradients, live.flops


def longest_prompt(config: SubjectConfig) -> str:
    """The longest of the captions, where pictures are given, and of the prompts that are encoded with them.

    In some families prompts keep their own lengths, and states that are kept are all filled up to the longest.
    """
    samples = find_samples(config.images, skip_bad=True) if config.images else []
    texts = [config.prompt, *(sample.caption for sample in samples if sample.caption)]
    if not config.train_text_encoder:
        texts += [text.format(token=config.token, noun=config.class_noun) for text in config.preview_prompts]
    return max(texts, key=len)


def disk(estimate: Plan) -> int:
    """Bytes that the adapter and the checkpoints that are kept take in the run folder."""
    config = estimate.config
    states = STATES.get(config.optimizer, 2) + (1 if config.ema_decay else 0)
    checkpoints = min(config.keep_checkpoints, -(-config.steps // config.checkpoint_every))
    return int(estimate.parameters * 4 * (1 + checkpoints * (1 + states)))


def least_seconds(estimate: Plan) -> float:
    """Time of all steps if they were nothing but large matrix products on this machine."""
    device = devices.device()
    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, dtype=DTYPES[estimate.config.precision], device=device)
    best = min(timed(lambda: (a @ a)[0, 0].item()) for _ in range(5))
    return estimate.config.steps * estimate.flops / (2 * n**3 / best)


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def frozen_bytes(model: nn.Module, quantize: str) -> int:
    """Bytes of a model's frozen weights."""
    frozen = sum(p.numel() * p.dtype.itemsize for p in model.parameters() if not p.requires_grad)
    if quantize == "none":
        return frozen
    inside = [layer.weight for layer in linears(model).values()]
    dense = sum(weight.numel() * weight.dtype.itemsize for weight in inside)
    return int(frozen - dense + sum(weight.numel() for weight in inside) * QUANTISED[quantize])


# What makes a run smaller, from what costs least (in quality, then in time) to what costs most.
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--precision bf16", {"precision": "bf16"}),
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--optimizer AdamW8bit", {"optimizer": "AdamW8bit"}),
    ("--batch-size 1", {"batch_size": 1}),
    ("--quantize int8", {"quantize": "int8"}),
    ("--quantize nf4", {"quantize": "nf4"}),
)


def advice(estimate: Plan) -> list[str]:
    """What each saving alone would make of it, the smallest first; those that save less than a twentieth are left out."""
    lines = []
    for flag, change in SAVINGS:
        if replace(estimate.config, **change) != estimate.config:
            peak = estimate.under(change).peak
            if peak < 0.95 * estimate.peak:
                lines.append((peak, f"with {flag:25} {peak / 2**30:8.2f} GiB"))
    return [line for _, line in sorted(lines)]


def fitted(estimate: Plan, gib: float) -> tuple[list[str], Plan]:
    """The flags of as few savings as bring a plan under so many GiB, and the plan with them.

    Raises:
        UserError: when all of them together are not enough.
    """
    flags: list[str] = []
    for flag, change in SAVINGS:
        if estimate.peak <= gib * 2**30:
            break
        if (smaller := estimate.under(change)).peak < 0.98 * estimate.peak:
            flags = [kept for kept in flags if kept.split()[0] != flag.split()[0]] + [flag]
            estimate = smaller
    if estimate.peak > gib * 2**30:
        raise UserError(
            f"With {' '.join(flags) or 'these settings'} a step still takes {estimate.peak / 2**30:.2f} GiB, more than {gib:g}: lower "
            "--resolution, or choose a smaller base."
        )
    return flags, estimate
