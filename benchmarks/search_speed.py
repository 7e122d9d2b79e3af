"""Candidates a second in the structure search: ours against the released way, side by side on one model.

    python benchmarks/search_speed.py [--rounds 15] [--out FILE.json]

Released way: in every layer and forward pass full-size tensors for A, B and C (zeros where they are not chosen), the weight
W + W * A + B and its bias built from them, one product. Ours: a path is set, factors stay factors. Same structures, same batch, same
answers (checked). floor: the model's forward pass without any adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from rankfold.toolkit.adapters.attach import attach
from rankfold.toolkit.adapters.variants.glora import CHOICES
from rankfold.toolkit.adapters.variants.glora_supernet import (
    Choices,
    GloraSupernetConfig,
    GloraSupernetLayer,
    cache_pieces,
    select_tensors,
    supernet_layers,
)
from rankfold.toolkit.core.modules import replace_module


class Released(nn.Module):
    """A layer of the supernet as the released code computes it (elementwise A)."""

    def __init__(self, layer: GloraSupernetLayer) -> None:
        super().__init__()
        self.layer, self.choices = layer, ("none",) * 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.get_base_layer().weight, self.layer.get_base_layer().bias
        t = select_tensors(self.layer.tensors("default"), self.choices)

        def full(part: str) -> torch.Tensor:
            if f"{part}_down" in t:
                return t[f"{part}_up"] @ t[f"{part}_down"]
            return t[f"{part}_up"].expand_as(weight).clone() if f"{part}_up" in t else torch.zeros_like(weight)

        if "c_up" in t:
            prompt = t["c_up"] @ t["c_down"] if "c_down" in t else t["c_up"]
        else:
            prompt = torch.zeros(weight.shape[1], 1)
        old = torch.zeros(len(weight)) if bias is None else bias
        d, e = (t[name] if name in t else torch.zeros(len(weight)) for name in "de")
        return F.linear(x, weight + weight * full("a") + full("b"), old + d * old + e + (weight @ prompt).flatten())


def models() -> dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[nn.Module], torch.Tensor]]]:
    """Name -> model, its layers, a forward pass."""
    from diffusers import UNet2DConditionModel
    from open_clip.transformer import VisionTransformer

    from rankfold.toolkit.core.paths import assets_folder

    torch.manual_seed(0)
    latents, states, steps = torch.randn(32, 24, 8, 8), torch.randn(32, 77, 1), torch.arange(32) * 30
    image = torch.randn(8, 3, 224, 224)

    def unet() -> nn.Module:
        return UNet2DConditionModel.from_pretrained(assets_folder() / "tiny" / "sd", subfolder="unet")

    def run_unet(rows: int) -> Callable[[nn.Module], torch.Tensor]:
        def run(model: nn.Module) -> torch.Tensor:
            words = states[:rows].expand(-1, -1, model.config.cross_attention_dim)
            return model(latents[:rows], steps[:rows], encoder_hidden_states=words).sample

        return run

    def tower() -> nn.Module:
        return VisionTransformer(
            image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
        )

    attention = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        "embedded UNet, 8 rows": (unet, attention, run_unet(8)),
        "embedded UNet, 32 rows": (unet, attention, run_unet(32)),
        "ViT-B/16, 1 image": (tower, ("c_fc", "c_proj"), lambda model: model(image[:1])),
        "ViT-B/16, 8 images": (tower, ("c_fc", "c_proj"), lambda model: model(image)),
    }


def with_supernet(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    """The model with a supernet of rank 4 whose tensors are not zero."""
    config = GloraSupernetConfig(r=4, target_modules=list(targets), form="elementwise")
    attach(model, config)
    for layer in supernet_layers(model).values():
        for tensor in layer.tensors("default").values():
            nn.init.normal_(tensor, std=0.01)
    return model.eval()


def random_path(names: list[str], random: Random) -> dict[str, Choices]:
    """A structure drawn as the first generation's are."""
    return {name: tuple(random.choice(CHOICES[part]) for part in CHOICES) for name in names}


def time_alternating(
    name: str, plain: nn.Module, ours: nn.Module, theirs: nn.Module, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side for the same random structures, the order of sides turning."""
    _, _, run = models()[name]
    layers, random = supernet_layers(ours), Random(0)
    times: dict[str, list[float]] = {"ours": [], "released": [], "floor": []}
    for number in range(rounds + 2):
        path = random_path(list(layers), random)
        for key, choices in path.items():
            layers[key].path["default"] = choices
            theirs.get_submodule(key).choices = choices
        answers = {}
        sides = [("ours", ours), ("released", theirs), ("floor", plain)]
        for side, model in sides if number % 2 else sides[::-1]:
            start = time.perf_counter()
            answers[side] = run(model)
            times[side].append(time.perf_counter() - start)
        torch.testing.assert_close(answers["ours"], answers["released"], rtol=1e-2, atol=1e-2)
    return times


@torch.no_grad()
def compare(name: str, rounds: int) -> dict[str, object]:
    """Candidates a second: ours, the released way, and the floor."""
    make, targets, _ = models()[name]
    plain = make().requires_grad_(False).eval()
    ours = with_supernet(copy.deepcopy(plain), targets)
    theirs = copy.deepcopy(ours)
    layers = supernet_layers(theirs)
    for key, layer in layers.items():
        replace_module(theirs, key, Released(layer))
    with cache_pieces(ours):  # as the search does it
        times = time_alternating(name, plain, ours, theirs, rounds)
    middle = {side: statistics.median(own[2:]) for side, own in times.items()}
    ratios = sorted(b / a for a, b in zip(times["ours"][2:], times["released"][2:], strict=True))
    return {
        "model": name,
        "ours": 1 / middle["ours"],
        "released": 1 / middle["released"],
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "ratio_at_the_floor": middle["released"] / middle["floor"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in models():
        rows.append(row := compare(name, options.rounds))
        print(
            f"{name:24} ours {row['ours']:.1f}/s  released {row['released']:.1f}/s  ratio {row['ratio']:.2f} "
            f"({row['least']:.2f} to {row['most']:.2f})  at the floor {row['ratio_at_the_floor']:.2f}",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
