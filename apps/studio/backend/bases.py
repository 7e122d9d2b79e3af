"""Base models as people choose them: what each is, what it asks of this machine, and whether it is here already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from ....toolkit.core.devices import device, free_memory
from ....toolkit.core.errors import UserError
from ....toolkit.diffusion.load import EMBEDDED, find_family

GIB = 2**30


@dataclass(frozen=True)
class BaseCard:
    """A base model."""

    name: str
    """What --base calls it."""
    title: str
    family: str
    gib: float
    """Memory that training with its defaults takes about; 0 where nobody has said."""
    licence: str
    note: str = ""


CARDS = (
    BaseCard("tiny", "Tiny", "Stable Diffusion", 1, "comes with rankfold", "Drawings of 64 pixels only: for the demo"),
    BaseCard("tiny-dit", "Tiny flow", "Stable Diffusion 3", 1, "comes with rankfold", "Drawings of 64 pixels only: for the demo"),
    BaseCard("tiny-turbo", "Tiny in four steps", "Stable Diffusion 3", 1, "comes with rankfold", "Drawings of 64 pixels, in four steps"),
    BaseCard("tiny-kontext", "Tiny with references", "FLUX.1 Kontext", 1, "comes with rankfold", "Drawings of 64 pixels, made from others"),
    BaseCard("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", "Stable Diffusion", 5, "CreativeML OpenRAIL-M"),
    BaseCard("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL", "Stable Diffusion XL", 8, "CreativeML OpenRAIL++-M"),
    BaseCard("black-forest-labs/FLUX.1-dev", "FLUX.1 dev", "FLUX.1", 27, "non-commercial; needs an account"),
)  # fmt: skip


def known_bases() -> list[BaseCard]:
    """The usual ones, and what else lies in the hub's local cache."""
    known = {card.name for card in CARDS}
    return [*CARDS, *(card for card in cached_bases() if card.name not in known)]


def cached_bases() -> list[BaseCard]:
    """Pipelines of known families in the hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found: dict[str, BaseCard] = {}
    for file in sorted(Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/model_index.json")):
        name = file.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        try:
            family = find_family(str(json.loads(file.read_text(encoding="utf-8")).get("_class_name")))
        except (OSError, ValueError, AttributeError, UserError):
            continue
        if family is not None:
            found[name] = BaseCard(name, name.split("/")[-1], family.__name__, 0, "see its card on the hub")
    return list(found.values())


def is_here(card: BaseCard) -> bool:
    """Whether nothing need be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"models--{card.name.replace('/', '--')}"
    return card.name in EMBEDDED or any(Path(HF_HUB_CACHE).glob(f"{folder}/snapshots/*/model_index.json"))


def memory_gib() -> float:
    """Memory that is free for training here."""
    return (free_memory(device()) or psutil.virtual_memory().available) / GIB


def describe_base(card: BaseCard, free: float) -> str:
    """A card's lines. free: GiB that are free here."""
    fits = "" if card.gib <= free else f": more than the {free:.0f} GiB that are free here"
    memory = f"about {card.gib:g} GiB{fits}" if card.gib else "memory: see the estimate"
    lines = [card.title, f"{card.family} · {memory}", card.licence]
    lines += [card.note] if card.note else []
    return "\n".join([*lines, "ready to use" if is_here(card) else "not downloaded yet"])
