"""What a run will take, before any weight is loaded: its step is carried out on tensors that have shapes and no numbers.

Models are built from their configs alone (torch's FakeTensorMode), adapters put on them as in training, and one step after
another is run while every allocation is counted. So the estimate knows the real architecture, checkpointing, the adapter's own
working memory and the optimizer's, and needs no table that could go stale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ...toolkit.adapters.attach import remove_unused_adapters, trainable_parameters
from ...toolkit.core import devices
from ...toolkit.core.errors import UserError
from ...toolkit.core.quantize import block_linears
from ...toolkit.data.references import add_references
from ...toolkit.data.subjects import find_samples
from ...toolkit.diffusion.load import open_model, resolve_base
from ...toolkit.diffusion.model import DTYPES, DiffusionModel, PromptEmbeds
from ..config.checks import check_ranges
from ..config.defaults import resolve_defaults, resolve_preview_base
from ..config.subject import SubjectConfig
from ..engine.block_swap import BLOCKS_AT_ONCE, swappable_weights, swapped_numbers
from ..engine.processes import num_processes
from ..subject.adapter import SubjectAdapter
from ..subject.batches import ImageBatches
from ..subject.denoising import DenoisingLoss, TargetGuidance, batch_references, repeated_blocks, timestep_weighting
from ..subject.prompts import fill_in
from ..subject.rows import Rows
from ..subject.sizes import reference_size, square_size, trained_sizes
from ..subject.training_adapter import read_changes
from .counting import MemoryTracker, RealTensorMode
from .savings import SettingChange, savings, to_flags
from .start import check_subject

CODE_BYTES = {"nf4": 0.5, "int8": 1, "fp8": 1}  # bytes per weight
BYTES_PER_WEIGHT = {
    "nf4": 0.5 + 4 / 64,
    "int8": 1 + 4 / 1024,
    "fp8": 1 + 4 / 1024,
}  # with its share of the scales
OPTIMIZER_STATES = {
    "AdamW": 2,
    "Adam": 2,
    "AdamW8bit": 0.5,
    "Lion8bit": 0.25,
    "Lion": 1,
    "CAME": 1,
    "Prodigy": 4,
    "AdamWScheduleFree": 2,
    "SGD": 0,
}


@dataclass(frozen=True)
class StepCost:
    """What does not hang on the optimizer, nor on the frozen weights' number of bits."""

    frozen: dict[str, int]
    """Bytes of the frozen model by --quantize."""
    blocks: dict[str, tuple[int, ...]]
    """Bytes of what each block of the denoiser can swap, likewise."""
    largest: int
    """Bytes of the largest layer's weight as it is multiplied with."""
    alive: int
    """Bytes alive beside weights and gradients at the peak."""
    parameters: int
    """Trainable parameters."""
    flops: int
    """Operations of one pass forward and back."""


@dataclass(frozen=True)
class Plan:
    """Bytes, and what they are for."""

    config: SubjectConfig
    step: StepCost

    @property
    def base(self) -> int:
        """What is on the device of the frozen model, in the dtype of the run."""
        return self.step.frozen[self.config.quantize] - saved_by_swapping(self.swapped)

    @property
    def swapped(self) -> list[int]:
        """Bytes of each block that waits in main memory."""
        blocks, wanted = self.step.blocks[self.config.quantize], self.config.blocks_to_swap
        return [blocks[number] for number in swapped_numbers(wanted, len(blocks))] if wanted else []

    @property
    def adapter(self) -> int:
        """The adapter, its gradient, its average and the optimizer's state."""
        average = 1 if self.config.ema_decay else 0
        return int(self.step.parameters * 4 * (2 + OPTIMIZER_STATES.get(self.config.optimizer, 2) + average))

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
        """Trainable parameters."""
        return self.step.parameters

    @property
    def flops(self) -> int:
        """Operations of one optimizer step."""
        return self.step.flops * self.config.gradient_accumulation

    def with_settings(self, change: dict[str, Any]) -> Plan:
        """The plan with other settings; a step is recomputed only where it would be another."""
        other = replace(self.config, **change)
        return Plan(
            other, self.step if change.keys() <= {"optimizer", "quantize", "blocks_to_swap"} else simulate_step(other)
        )


def plan(config: SubjectConfig) -> Plan:
    """What a step of this run takes.

    Raises:
        UserError: for a base or settings that cannot work.
    """
    check_ranges(config)
    config = resolve_defaults(config)
    return Plan(config, simulate_step(config))


def simulate_step(config: SubjectConfig) -> StepCost:
    """A step carried out on tensors without numbers.

    Raises:
        UserError: for a base or settings that cannot work.
    """
    check_subject(config)
    model = open_model(resolve_base(config.base), DTYPES[config.precision], "meta")
    batch = example_batch(config, model)
    waiting = waiting_bytes(config, model)
    parts = SubjectAdapter(config).attach(model)
    if config.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    held = [getattr(model, name) for name in (model.text_encoders() if encodes_each_step(config) else [])]
    frozen = {
        kind: sum(frozen_bytes(part, kind) for part in {model.denoiser, *held}) for kind in ("none", *BYTES_PER_WEIGHT)
    }
    for kind, own in waiting.items():
        frozen[kind] += own
    in_few_bits = {id(layer.weight) for layer in block_linears(model.denoiser).values()}
    blocks = {
        kind: tuple(swap_bytes(block, in_few_bits, kind) for block in repeated_blocks(model.denoiser))
        for kind in ("none", *CODE_BYTES)
    }
    alive, flops = step_peak(model, parts, config, batch)
    for part in parts.values():
        remove_unused_adapters(part)
    numbers = sum(parameter.numel() for part in parts.values() for parameter in trainable_parameters(part))
    dense = (layer.weight.numel() for layer in block_linears(model.denoiser).values())
    largest = max(dense, default=0) * model.dtype.itemsize
    return StepCost(frozen, blocks, largest, alive, numbers, flops)


def encodes_each_step(config: SubjectConfig) -> bool:
    """Whether prompts are encoded in each step, since something of the text encoders is trained; then all of them stay."""
    return config.train_text_encoder or config.num_vectors > 0


def example_batch(config: SubjectConfig, model: DiffusionModel) -> dict[str, torch.Tensor]:
    """The first batch that this process would get, of images of the largest size there is."""
    share = config.batch_size // num_processes()
    noise = model.noise(config.timestep_sampling, config.timestep_shift)
    prior = [blank_rows(config, model, square_size(config, model))] if config.prior_weight else None
    rows = blank_rows(config, model, largest_size(config, model))
    numbers = torch.zeros(len(rows), dtype=torch.long)
    rows.without_token = numbers if config.preservation_weight else None
    rows.mask = torch.ones(len(rows), 1, *rows.mean.shape[2:]) if config.masks else None
    rows.references = [blank_rows(config, model, size).mean for size in largest_references(config, model)]
    batches = ImageBatches(config, noise, torch.device("cpu"), [rows], prior, shards_base=config.shard_base)
    return batches.batch_at(0, list(range(share)))


def blank_rows(config: SubjectConfig, model: DiffusionModel, size: tuple[int, int]) -> Rows:
    """As many images of this size (width, height) as a batch holds."""
    width, height = (side // model.latent_scale for side in size)
    latents = torch.zeros(config.batch_size, model.latent_channels, height, width)
    return Rows(latents, latents, torch.zeros(config.batch_size, 1, dtype=torch.long))


def largest_size(config: SubjectConfig, model: DiffusionModel) -> tuple[int, int]:
    """The largest (width, height) of the images that are trained on, pixels."""
    if config.images is None:
        side = max(square_size(config, model)[0], *config.extra_resolutions, 0)
        return side, side
    samples = find_samples(config.images, skip_bad=config.skip_bad)
    return max((size for one in samples for size in trained_sizes(config, one, model)), key=prod)


def largest_references(config: SubjectConfig, model: DiffusionModel) -> list[tuple[int, int]]:
    """The sizes of the references of the image that has most of them, by their pixels."""
    if config.images is None:
        size = square_size(config, model)
        return [model.own_reference_size(size) or size] * model.min_references
    samples = add_references(find_samples(config.images, skip_bad=config.skip_bad), config.references)
    found = [
        [reference_size(config, path, size, model) for path in sample.references]
        for sample in samples
        for size in trained_sizes(config, sample, model)
    ]
    return max(found, key=lambda sizes: sum(map(prod, sizes)))


def step_peak(
    model: DiffusionModel, parts: dict[str, nn.Module], config: SubjectConfig, batch: dict[str, torch.Tensor]
) -> tuple[int, int]:
    """Bytes alive at the peak of a forward and backward pass, beside weights and the adapter's gradients; operations of the pass."""
    model.text_pipeline()  # whose scheduler wants real numbers
    seen: PromptEmbeds = {}
    if model.prompts_see_references:
        sides = [[side * model.latent_scale for side in latents.shape[:1:-1]] for latents in batch_references(batch)]
        seen = model.blank_embeds(
            longest_prompt(config), [Image.new("RGB", (width, height)) for width, height in sides]
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in {*parts.values(), *(getattr(model, name) for name in model.text_encoders())}:
            part.to_empty(device="cpu")
        model.device = torch.device("cpu")
        fake, words = ({name: torch.empty_like(value) for name, value in own.items()} for own in (batch, seen))
        return count_step(model, parts, config, fake, words)


def count_step(
    model: DiffusionModel,
    parts: dict[str, nn.Module],
    config: SubjectConfig,
    batch: dict[str, torch.Tensor],
    words: PromptEmbeds,
) -> tuple[int, int]:
    """Peak of one pass on fake tensors, less the gradients, which are counted with the adapter; and its operations.

    words: a prompt's embeds (1, ...), where the text encoder cannot be asked here.
    """
    noise = model.noise(config.timestep_sampling, config.timestep_shift)
    prompt = longest_prompt(config)
    rows = sum(len(batch[name]) for name in ("prompt", "preservation_prompt") if name in batch)
    with torch.no_grad(), RealTensorMode():
        prompt_embeds = {k: v.repeat_interleave(rows, 0) for k, v in words.items()} or model.encode_prompts(
            [prompt] * rows
        )

    def prompt_embeds_of(numbers: torch.Tensor) -> PromptEmbeds:
        if encodes_each_step(config):
            return model.encode_prompts([prompt] * len(numbers))
        return {name: value[: len(numbers)] for name, value in prompt_embeds.items()}

    guidance = TargetGuidance(config.target_guidance, empty_prompt=-1) if config.target_guidance != 1 else None
    module = DenoisingLoss(model, parts, noise, prompt_embeds_of, timestep_weighting(config), guidance).train()
    before = [*module.parameters(), *module.buffers(), *batch.values(), *prompt_embeds.values()]
    try:
        with MemoryTracker(before) as live, RealTensorMode():
            module(batch).mean().backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = model.index["_class_name"] + (" with trained text encoders" if encodes_each_step(config) else "")
        raise UserError(
            f"A {kind} works as its prompts' numbers say, so its step cannot be planned without them."
        ) from error
    gradients = sum(p.numel() * 4 for part in parts.values() for p in trainable_parameters(part) if p.grad is not None)
    return live.peak - gradients, live.flops


def longest_prompt(config: SubjectConfig) -> str:
    """The longest of the captions, where images are given, and of the prompts that are encoded with them.

    In some families prompts keep their own lengths, and states that are kept are all filled up to the longest.
    """
    samples = find_samples(config.images, skip_bad=True) if config.images else []
    texts = [config.prompt, *(sample.caption for sample in samples if sample.caption)]
    if not encodes_each_step(config):
        texts += [fill_in(text, config.token, config.class_noun) for text in config.preview_prompts]
    return max(texts, key=len)


def disk_bytes(estimate: Plan) -> int:
    """Bytes that the adapter and the checkpoints that are kept take in the run folder."""
    config = estimate.config
    states = OPTIMIZER_STATES.get(config.optimizer, 2) + (1 if config.ema_decay else 0)
    checkpoints = min(config.keep_checkpoints, -(-config.steps // config.checkpoint_every))
    return int(estimate.parameters * 4 * (1 + checkpoints * (1 + states)))


def min_seconds(estimate: Plan) -> float:
    """Time of all steps if they were nothing but large matrix products on this machine."""
    device = devices.device()
    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, dtype=DTYPES[estimate.config.precision], device=device)
    best = min(time_call(lambda: (a @ a)[0, 0].item()) for _ in range(5))
    return estimate.config.steps * estimate.flops / (2 * n**3 / best)


def time_call(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def frozen_bytes(model: nn.Module, quantize: str) -> int:
    """Bytes of a model's frozen weights."""
    frozen = sum(p.numel() * p.dtype.itemsize for p in model.parameters() if not p.requires_grad)
    if quantize == "none":
        return frozen
    inside = [layer.weight for layer in block_linears(model).values()]
    dense = sum(weight.numel() * weight.dtype.itemsize for weight in inside)
    return int(frozen - dense + sum(weight.numel() for weight in inside) * BYTES_PER_WEIGHT[quantize])


def swap_bytes(block: nn.Module, in_few_bits: set[int], quantize: str) -> int:
    """Bytes that a block can leave in main memory; the scales of its layers in few bits are left out. in_few_bits: ids of their weights."""
    weights, size = swappable_weights(block), CODE_BYTES.get(quantize)
    return int(sum(w.numel() * (size if size and id(w) in in_few_bits else w.dtype.itemsize) for w in weights))


def saved_by_swapping(blocks: Sequence[int]) -> int:
    """Bytes that are not on the device of swapped blocks of so many bytes: all but the largest one and its neighbour."""
    return sum(blocks) - max(map(sum, zip(blocks, [*blocks[1:], *blocks[:1]], strict=True)), default=0)


def preview_bytes(config: SubjectConfig) -> dict[str, int]:
    """By --quantize, bytes on the device of the denoiser that images are drawn with (subject/preview_base.py)."""
    model = open_model(resolve_preview_base(config.preview_base), DTYPES[config.precision], "meta")
    in_few_bits = {id(layer.weight) for layer in block_linears(model.denoiser).values()}
    found = {kind: frozen_bytes(model.denoiser, kind) for kind in ("none", *CODE_BYTES)}
    if devices.has_own_memory(devices.device().type):
        for kind in found:
            blocks = [swap_bytes(block, in_few_bits, kind) for block in repeated_blocks(model.denoiser)]
            found[kind] -= saved_by_swapping(blocks)
    return found


def waiting_bytes(config: SubjectConfig, model: DiffusionModel) -> dict[str, int]:
    """By --quantize, bytes on the device that only drawing needs (subject/drawing_weights.py, subject/preview_base.py)."""
    if config.preview_base:
        return preview_bytes(config)
    if config.training_adapter is None:
        return {}
    blocks = block_linears(model.denoiser)
    names = read_changes(config.training_adapter, model, model.denoiser_name)
    whole = {n: sum(p.numel() * p.dtype.itemsize for p in model.denoiser.get_submodule(n).parameters()) for n in names}
    found = {"none": sum(whole.values()) if devices.device().type == "cpu" else 0}
    for kind, size in BYTES_PER_WEIGHT.items():
        found[kind] = int(sum(blocks[n].weight.numel() * size if n in blocks else own for n, own in whole.items()))
    return found


def advice(estimate: Plan) -> list[str]:
    """What each saving alone would make of it, the smallest first; those that save less than a twentieth are left out."""
    lines = []
    for flag, change in savings(estimate.config):
        peak = estimate.with_settings(change).peak
        if peak < 0.95 * estimate.peak:
            lines.append((peak, f"with {flag:25} {peak / 2**30:8.2f} GiB"))
    return [line for _, line in sorted(lines)]


def fewest_blocks(estimate: Plan, gib: float) -> tuple[str, SettingChange]:
    """The saving that swaps as few blocks as bring a plan under `gib` GiB; all of them where that is not enough."""
    blocks = len(estimate.step.blocks["none"])
    counts: list[int | str] = [*range(BLOCKS_AT_ONCE + 1, blocks), "all"]
    changes = [{"blocks_to_swap": count} for count in counts]
    change = next((c for c in changes if estimate.with_settings(c).peak <= gib * 2**30), changes[-1])
    return to_flags(change), change


def fit_to_memory(estimate: Plan, gib: float) -> tuple[list[str], Plan]:
    """The flags of as few savings as bring a plan under `gib` GiB, and the plan with them.

    Raises:
        UserError: when all of them together are not enough.
    """
    chosen: list[str] = []
    for flag, change in savings(estimate.config):
        if estimate.peak <= gib * 2**30:
            break
        if "blocks_to_swap" in change:
            flag, change = fewest_blocks(estimate, gib)
        if (smaller := estimate.with_settings(change)).peak < 0.98 * estimate.peak:
            chosen = [kept for kept in chosen if kept.split()[0] != flag.split()[0]] + [flag]
            estimate = smaller
    if estimate.peak > gib * 2**30:
        raise UserError(
            f"With {' '.join(chosen) or 'these settings'} a step still takes {estimate.peak / 2**30:.2f} GiB, more than {gib:g}: lower "
            "--resolution, or choose a smaller base."
        )
    return chosen, estimate
