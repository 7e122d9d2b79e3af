"""The judge: a small classifier that reads shape, colour, scene and the rest off a 64 px image.

It is trained on rendered images only, so what it says of generated ones is a fair reading, not a memory.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from .world import COLOURS, COUNTS, CREATURE_SHAPE, FACES, PATTERNS, PLACES, SCENES, SHAPES, SIZES, Thing

ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, CREATURE_SHAPE),
    "colour": tuple(COLOURS),
    "scene": tuple(SCENES),
    "pattern": PATTERNS,
    "face": FACES,
    "size": SIZES,
    "place": tuple(PLACES),
    "count": COUNTS,
}
IGNORE = -100  # label of a question that an image does not answer


class Judge(nn.Module):
    """Five strided convolutions and one linear head per question."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(channels):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(4 * width, 64, 1), nn.GELU(), nn.Flatten())  # (B, 64 * 4 * 4)
        self.heads = nn.ModuleDict({name: nn.Linear(1024, len(answers)) for name, answers in ANSWERS.items()})

    def forward(self, pixels_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, 64, 64) in [-1, 1] -> logits (B, answers) per question."""
        features = self.body(pixels_BCHW)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: list[Image.Image]) -> list[dict[str, str]]:
        """The judge's answers for each image."""
        logits = self(images_to_pixels(images))
        best = {name: value.argmax(-1).tolist() for name, value in logits.items()}
        return [{name: ANSWERS[name][best[name][i]] for name in ANSWERS} for i in range(len(images))]


def images_to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """PIL images -> (B, 3, 64, 64) in [-1, 1]; other sizes are reduced first."""
    small = [p.convert("RGB") if p.size == (64, 64) else p.convert("RGB").resize((64, 64)) for p in images]
    return torch.stack([pil_to_tensor(p) for p in small]).float() / 127.5 - 1


def label_indices(thing: Thing) -> list[int]:
    """The right answer's index for each question of ANSWERS; IGNORE where the image does not settle it."""
    creature = thing.shape == CREATURE_SHAPE
    asked = {name: getattr(thing, name) for name in ANSWERS}
    if creature:
        asked |= {"colour": None, "pattern": None, "face": None}
    if thing.count != "one":
        asked |= {"place": None, "size": None}
    return [IGNORE if asked[name] is None else ANSWERS[name].index(asked[name]) for name in ANSWERS]


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights in fp16."""
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, path)


def load_judge(path: Path) -> Judge:
    """Reads what `save_judge` wrote."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval()
