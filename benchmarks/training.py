"""A training step on SDXL and FLUX.1: ours, PEFT's LoRA in a plain loop, and the floor, alternating in one process.

    python benchmarks/training.py [--sizes sdxl flux] [--batches 1 4] [--rounds 10] [--out benchmarks/results/training.json]

Random weights in the released architectures: bf16 in the released sizes (latents of 1024 px) where there is a GPU, fp32 in small ones
on a CPU. Both sides start from latents and prompt states, as cached, and train rank 16 on the attention layers: ours is MoSLoRA by
`attach`, make_optimizer and the loop's one-norm clipping; the plain loop is `add_adapter(LoraConfig)`, torch's AdamW and
clip_grad_norm_, as the example scripts have it. The floor is what the step's operations would take at the rate of large matrix
products. Printed: medians of the rounds' ratios and their spread (least, most); on a GPU also what a step takes
beside the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from peft import LoraConfig
from timing import median_and_range, seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.toolkit.adapters.attach import attach, parameter_groups
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.diffusion.model import ATTENTION_TARGETS, JOINT_ATTENTION_TARGETS, pack_latents
from rankfold.training.config.subject import SubjectConfig
from rankfold.training.engine.optimizer import make_optimizer
from rankfold.training.subject.denoising import compile_blocks

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
RANK = 16


def sdxl() -> tuple[nn.Module, Callable[[int], dict]]:
    """SDXL's UNet (on a CPU an eighth as wide), and its inputs for a batch."""
    widths, cross, side = ((320, 640, 1280), 2048, 128) if GPU else ((64, 128, 256), 256, 32)
    unet = diffusers.UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=tuple(width // 64 for width in widths),
        cross_attention_dim=cross,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )

    def inputs(batch: int) -> dict:
        added = {"text_embeds": random(batch, 1280), "time_ids": random(batch, 6)}
        return {
            "sample": random(batch, 4, side, side),
            "timestep": torch.full((batch,), 500, device=DEVICE),
            "encoder_hidden_states": random(batch, 77, cross),
            "added_cond_kwargs": added,
        }

    return unet, inputs


def flux() -> tuple[nn.Module, Callable[[int], dict]]:
    """FLUX.1's transformer (on a CPU four and eight blocks, a sixth as wide), and its inputs for a batch."""
    size = (
        {} if GPU else {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 4, "joint_attention_dim": 512}
    )
    transformer = diffusers.FluxTransformer2DModel(**size, guidance_embeds=True)
    side, words = (128, 512) if GPU else (32, 128)

    def inputs(batch: int) -> dict:
        places = torch.zeros((side // 2) ** 2, 3, device=DEVICE, dtype=DTYPE)
        return {
            "hidden_states": pack_latents(random(batch, 16, side, side)),
            "timestep": torch.full((batch,), 0.5, device=DEVICE, dtype=DTYPE),
            "guidance": torch.ones(batch, device=DEVICE),
            "pooled_projections": random(batch, 768),
            "encoder_hidden_states": random(batch, words, transformer.config.joint_attention_dim),
            "txt_ids": places.new_zeros(words, 3),
            "img_ids": places,
        }

    return transformer, inputs


SIZES = {"sdxl": (sdxl, ATTENTION_TARGETS), "flux": (flux, JOINT_ATTENTION_TARGETS)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def fresh(size: str) -> tuple[nn.Module, Callable[[int], dict]]:
    """A frozen denoiser, the same at every call."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        denoiser, inputs = SIZES[size][0]()
    return denoiser.to(DTYPE).requires_grad_(False).train(), inputs


def ours(size: str, batch: int, *, compiled: bool = False) -> Callable[[], None]:
    """One step as our loop takes it."""
    denoiser, inputs = fresh(size)
    attach(denoiser, make_config("moslora", rank=RANK, alpha=RANK, dropout=0.0, target_modules=SIZES[size][1]))
    if compiled:
        compile_blocks(denoiser)
    optimizer = make_optimizer(SubjectConfig(), parameter_groups(denoiser, 1e-4))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    given = inputs(batch)

    def step() -> None:
        loss_of(denoiser, given).backward()
        gradients = [p.grad for p in parameters]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return step


def plain_step(size: str, batch: int) -> Callable[[], None]:
    """One step as the example scripts take it."""
    denoiser, inputs = fresh(size)
    denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES[size][1])))
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer, given = torch.optim.AdamW(parameters, lr=1e-4), inputs(batch)

    def step() -> None:
        loss_of(denoiser, given).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_of(denoiser: nn.Module, given: dict) -> torch.Tensor:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
        guess = denoiser(**given, return_dict=False)[0]
    return F.mse_loss(guess.float(), torch.zeros_like(guess, dtype=torch.float32))


def peak(step: Callable[[], None]) -> float:
    """GiB at the peak of a step, beside what is held between steps."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def min_step_seconds(step: Callable[[], None]) -> float:
    """Seconds that a step's operations take at the rate of large matrix products."""
    with FlopCounterMode(display=False) as flops:
        step()
    n = 8192 if GPU else 1024
    a = random(n, n)
    best = min(seconds(lambda: a @ a) for _ in range(10))
    return flops.get_total_flops() * best / (2 * n**3)


def compare_seconds(size: str, batch: int, rounds: int) -> dict[str, object]:
    """Ratios of seconds per step."""
    sides = {"ours": ours(size, batch), "compiled": ours(size, batch, compiled=True), "plain": plain_step(size, batch)}
    for step in sides.values():
        for _ in range(3):
            step()
    times = [{name: seconds(step) for name, step in sides.items()} for _ in range(rounds)]
    floors = [min_step_seconds(sides["ours"]) for _ in range(3)]
    return {
        "plain over ours": median_and_range([row["plain"] / row["ours"] for row in times]),
        "plain over compiled": median_and_range([row["plain"] / row["compiled"] for row in times]),
        "ours over floor": median_and_range([row["ours"] / floor for row, floor in zip(times, floors, strict=False)]),
        "compiled over floor": median_and_range(
            [row["compiled"] / floor for row, floor in zip(times, floors, strict=False)]
        ),
        "working GiB": {name: peak(step) for name, step in sides.items()} if GPU else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name(0) if GPU else f"CPU, {options.threads} threads"
    found: dict[str, object] = {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "small sizes": not GPU,
    }
    for size in options.sizes:
        for batch in options.batches:
            found[f"{size}, batch {batch}"] = result = compare_seconds(size, batch, options.rounds)
            print(size, batch, json.dumps(result), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
