"""Speed and memory of every adapter against PEFT's LoRA at the same rank, forward and backward, alternating in one run.

    python benchmarks/adapters.py [--rounds 15] [--widths 320 640 1280] [--tokens 1024 4096] [--out FILE]

One adapted Linear(width, width) on a batch of tokens that needs a gradient, as in the middle of a model. Time: median of the
rounds' ratios, with their spread. Memory: the highest sum of live allocations of one step above what was there before it
(CPU: from the profiler's allocation events; GPU: torch.cuda's peak).

floor: time that the method's matrix products need, counted in operations, over what the other's need; for memory the bytes of
the output and of the gradient in the input, which any layer has, over what the other took.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft import get_peft_model
from timing import peak_bytes, seconds
from torch import nn

from rankfold.toolkit.adapters.auxiliary import auxiliary_losses
from rankfold.toolkit.adapters.composition import MixingCoefficients, attach_sources
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.core.change import Change

RANK = 16
CASES = {
    "moslora": ("moslora", {}),
    "loratrf": ("loratrf", {"filter_r": "8"}),
    "fvae training": ("fvae", {"encoder_width": "16"}),
    "fvae eval": ("fvae", {"encoder_width": "16"}),
    "glora matmul": ("glora", {}),
    "glora elementwise": ("glora", {"form": "elementwise"}),
    "8 composed": ("composition", {}),  # eight adapters of an eighth of the rank
}


def flops(case: str, d: int, n: int) -> float:
    """Multiply-adds of forward and backward of the whole layer; d wide, n tokens, rank r."""
    r, base = RANK, 2 * n * d * d  # forward, and the gradient in x; the weight is frozen
    low = 6 * n * d * r  # two small products, each forward, gradient in its input and in its factor
    extra = {
        "lora": low,
        "peft glora": low + 2 * n * d * d + n * d * d,
        "moslora": low + 3 * r * r * d,
        "loratrf": low + 6 * n * d * 8 + 3 * n * d,
        "fvae training": low + 2 * n * d * r + 3 * n * 128 * (2 * 128 + 2 * r) + 2 * n * 128 * (d + 128),
        "fvae eval": low,
        "glora matmul": 2 * low + 2 * d * d * r,
        "glora elementwise": low + n * d * d + 3 * d * d * r,
        "8 composed": low - n * d * r,  # the down factors need no gradient
    }
    return base + extra[case]


def make_step(case: str, d: int, n: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs one forward and backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, d)).to(device, dtype)
    if case == "8 composed":
        return timed_step(make_composed_layer(net, d).to(device), d, n, device, dtype)
    if case == "lora":
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    elif case == "peft glora":
        config = peft.GloraConfig(
            r=RANK, config_A_B="lora", config_C="vector", config_D_E="vector", target_modules=["0"]
        )
    else:
        name, options = CASES[case]
        options = {"target_modules": ("0",), "rank": RANK, "alpha": RANK, "dropout": 0.0, "options": options}
        config = make_config(name, **options)
    model = get_peft_model(net, config)
    return timed_step(model.train(case != "fvae eval"), d, n, device, dtype)


def make_composed_layer(net: nn.Sequential, d: int) -> nn.Module:
    """The layer with eight trained adapters whose weights are learned."""
    sources = [{"0": Change(torch.randn(RANK // 8, d), torch.randn(d, RANK // 8))} for _ in range(8)]
    attach_sources(net.requires_grad_(False), sources, lambda name: MixingCoefficients(8))
    return net


def timed_step(model: nn.Module, d: int, n: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of a model on n tokens of width d."""
    x = torch.randn(1, n, d, device=device, dtype=dtype, requires_grad=True)
    y = torch.randn(1, n, d, device=device, dtype=dtype)

    def step() -> None:
        with auxiliary_losses() as auxiliary:
            out = model(x)
        if auxiliary:
            torch.autograd.backward((out, auxiliary.total()), (y, None))
        else:
            out.backward(y)
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None

    return step


def compare(case: str, other: str, d: int, n: int, rounds: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    """`case` against `other`: ratios of time (median, least, most) and of memory."""
    ours, theirs = make_step(case, d, n, device, dtype), make_step(other, d, n, device, dtype)
    for step in (ours, theirs, ours, theirs):
        step()
    ratios = []
    for number in range(rounds):
        pair = [ours, theirs] if number % 2 == 0 else [theirs, ours]
        times = {id(step): seconds(step) for step in pair}
        ratios.append(times[id(ours)] / times[id(theirs)])
    return {
        "case": case,
        "against": other,
        "width": d,
        "tokens": n,
        "time": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "memory": peak_bytes(ours, device) / (other_bytes := peak_bytes(theirs, device)),
        "floor": flops(case, d, n) / flops(other, d, n),
        "memory_floor": 2 * n * d * dtype.itemsize / other_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[320, 640, 1280])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rows = []
    pairs = [(case, "lora") for case in options.cases]
    pairs += [(case, "peft glora") for case in options.cases if case.startswith("glora")]
    for case, other in pairs:
        for d in options.widths:
            for n in options.tokens:
                row = compare(case, other, d, n, options.rounds, options.device, dtype)
                rows.append(row)
                print(
                    f"{case:18} / {other:10} width {d:5} tokens {n:5}  time {row['time']:.2f} ({row['least']:.2f} to "
                    f"{row['most']:.2f})  floor {row['floor']:.2f}  memory {row['memory']:.2f} floor {row['memory_floor']:.2f}",
                    flush=True,
                )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
