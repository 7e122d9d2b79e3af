"""Sampling with several adapters active: ours, which puts them into the weights, against stock diffusers.

    python benchmarks/sampling.py [--adapters 1 2 3] [--rounds 20] [--base tiny] [--out benchmarks/results/sampling.json]

k adapters (LoRA, random, on attention and feed-forward layers) are kept as run folders and as diffusers files. Of one image of 10
steps, alternating: ours with k adapters, a pipeline with no adapter at all, stock diffusers with k active adapters, and stock
diffusers behind fuse_lora. And of loading one adapter, of loading and fusing it, and of switching between two that are loaded: our folders
against load_lora_weights and set_adapters with the same adapters' files.
Printed: medians of the rounds' ratios and their spread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import median_and_range, seconds

from rankfold.pipelines.fuse import fuse_adapters
from rankfold.pipelines.generate import Recipe, denoise, load_pipeline
from rankfold.toolkit.adapters.attach import attach, trainable_parameters
from rankfold.toolkit.adapters.fold import fold
from rankfold.toolkit.adapters.registry import make_config
from rankfold.toolkit.formats import native
from rankfold.toolkit.formats.adapter_facts import AdapterFacts
from rankfold.toolkit.formats.write import Part, write_lora

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
STEPS = 10


def make_adapters(base: str, count: int, root: Path) -> list[Path]:
    """Folders, each with an adapter as a run keeps it (native/) and as a diffusers file (diffusers/)."""
    folders = []
    for number in range(count):
        pipe = load_pipeline(Recipe(prompt="", base=base))
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        model = getattr(pipe, part)
        torch.manual_seed(number)
        attach(model, make_config("lora", rank=16, alpha=16.0, dropout=0.0, target_modules=TARGETS))
        for parameter in trainable_parameters(model):
            torch.nn.init.normal_(parameter, std=0.02)
        native.save_native(model, root / f"{number}" / "native" / part)
        write_lora(
            {part: Part(model, fold(model, "default"), "")},
            "diffusers",
            root / f"{number}" / "diffusers",
            AdapterFacts(),
            {},
        )
        folders.append(root / f"{number}")
    return folders


def ours(base: str, folders: list[Path]) -> Any:
    pipe = load_pipeline(Recipe(prompt="", base=base))
    for number, folder in enumerate(folders):
        native.load_into_pipeline(pipe, folder / "native", f"adapter_{number}")
    native.set_strengths(pipe, {f"adapter_{number}": 1.0 for number in range(len(folders))})
    return fuse_adapters(pipe)


def stock(base: str, folders: list[Path], *, fused: bool) -> Any:
    pipe = load_pipeline(Recipe(prompt="", base=base))
    names = [f"adapter_{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        pipe.load_lora_weights(str(folder / "diffusers"), adapter_name=name)
    pipe.set_adapters(names, [1.0] * len(names))
    if fused:
        pipe.fuse_lora()
    return pipe


def draw(pipe: Any) -> None:
    denoise(pipe, ["a creature"], seeds=[0], steps=STEPS, guidance_scale=3.0, width=64, output_type="latent")


def loading(base: str, folder: Path, rounds: int) -> dict[str, object]:
    """Seconds of ours over seconds of stock, for one adapter onto a pipeline that is there: loaded, and loaded and fused."""
    rows = []
    for number in range(rounds + 1):
        first, second = (load_pipeline(Recipe(prompt="", base=base)) for _ in range(2))
        sides: dict[str, list[Callable[[], object]]] = {
            "ours": [
                lambda p=first: native.load_into_pipeline(p, folder / "native", "a"),
                lambda p=first: fuse_adapters(p),
            ],
            "stock": [
                lambda p=second: p.load_lora_weights(str(folder / "diffusers"), adapter_name="a"),
                lambda p=second: p.fuse_lora(),
            ],
        }
        order = list(sides) if number % 2 else list(sides)[::-1]
        times = {name: [seconds(call) for call in sides[name]] for name in order}
        rows.append((times["ours"][0] / times["stock"][0], sum(times["ours"]) / sum(times["stock"])))
    loaded, fused = zip(*rows[1:], strict=True)  # the first round also imports
    return {"loading": median_and_range(list(loaded)), "loading and fusing": median_and_range(list(fused))}


def switching(base: str, folders: list[Path], rounds: int) -> dict[str, float]:
    """Seconds of ours over seconds of stock, from one of two loaded adapters to the other, neither of them fused."""
    first, second = (load_pipeline(Recipe(prompt="", base=base)) for _ in range(2))
    names = ["adapter_0", "adapter_1"]
    for name, folder in zip(names, folders, strict=True):
        native.load_into_pipeline(first, folder / "native", name)
        second.load_lora_weights(str(folder / "diffusers"), adapter_name=name)
    ratios = []
    for number in range(2 * rounds):
        wanted = names[number % 2]
        sides = {
            "ours": lambda name=wanted: native.set_strengths(first, {own: float(own == name) for own in names}),
            "stock": lambda name=wanted: second.set_adapters(name),
        }
        times = {side: seconds(sides[side]) for side in (sides if number % 2 else list(sides)[::-1])}
        ratios.append(times["ours"] / times["stock"])
    return median_and_range(ratios[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, object] = {"base": options.base, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as place:
        folders = make_adapters(options.base, max(2, max(options.adapters)), Path(place))
        for count in options.adapters:
            own = folders[:count]
            sides = {
                "ours": ours(options.base, own),
                "none": load_pipeline(Recipe(prompt="", base=options.base)),
                "stock": stock(options.base, own, fused=False),
                "stock fused": stock(options.base, own, fused=True),
            }
            for pipe in sides.values():
                draw(pipe)
            rows = [
                {name: seconds(lambda pipe=pipe: draw(pipe)) for name, pipe in sides.items()}
                for _ in range(options.rounds)
            ]
            result = {
                f"ours over {name}": median_and_range([row["ours"] / row[name] for row in rows])
                for name in sides
                if name != "ours"
            }
            found[f"{count} adapters"] = result
            print(count, json.dumps(result), flush=True)
        found["ours over stock"] = loading(options.base, folders[0], options.rounds)
        found["ours over stock"]["switching"] = switching(options.base, folders[:2], options.rounds)
        print(json.dumps(found["ours over stock"]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
