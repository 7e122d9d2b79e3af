"""The paths of a supernet: which choices each layer has, what they cost, and which are at work."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from torch import nn

from ...toolkit.adapters.variants.glora import CHOICES
from ...toolkit.adapters.variants.glora_supernet import (
    LARGEST,
    Choices,
    GloraSupernetLayer,
    select_tensors,
    single_choice,
    supernet_layers,
)
from ..config.search import InstructSearchConfig, SearchConfig, SearchSettings
from .evolution import SearchSpace, Structure, check_evolution


def choices_of(config: SearchSettings, part: str) -> tuple[str, ...]:
    """The choices that the search may take for A, B, C, D or E."""
    return getattr(config, f"choices_{part}")


class SupernetPaths:
    """The paths of a supernet that is on a model's parts, one of which is at work at a time."""

    def __init__(self, config: SearchConfig | InstructSearchConfig, parts: Mapping[str, nn.Module]) -> None:
        """Raises UserError when even the smallest structure is above the config's limit."""
        self.config = config
        self.layers: dict[str, GloraSupernetLayer] = {
            f"{part}.{name}": layer for part, model in parts.items() for name, layer in supernet_layers(model).items()
        }
        self.genes = [(name, part) for name in self.layers for part in CHOICES]
        self.options = [self.options_at(name, part) for name, part in self.genes]
        costs = tuple(
            tuple(self.cost(*gene, c) for c in own) for gene, own in zip(self.genes, self.options, strict=True)
        )
        self.space = SearchSpace(costs, config.limit or self.plain_lora_size())
        check_evolution(config, self.space)

    def options_at(self, layer: str, part: str) -> tuple[str, ...]:
        """Choices of a gene; without a bias there is nothing for D to scale."""
        own = choices_of(self.config, part)
        return ("none",) if part == "d" and self.layers[layer].base_bias() is None else own

    def cost(self, layer: str, part: str, choice: str) -> int:
        """Parameters of one choice."""
        return sum(
            tensor.numel()
            for tensor in select_tensors(self.layers[layer].tensors("default"), single_choice(part, choice)).values()
        )

    def plain_lora_size(self) -> int:
        """Parameters of plain LoRA of this rank on the same layers."""
        return sum(self.config.rank * (layer.fan_in + layer.fan_out) for layer in self.layers.values())

    def path_of(self, structure: Structure) -> dict[str, Choices]:
        """The choices of each layer."""
        picked = [options[number] for options, number in zip(self.options, structure, strict=True)]
        width = len(CHOICES)
        return {name: tuple(picked[i * width : (i + 1) * width]) for i, name in enumerate(self.layers)}

    def path_at(self, step: int) -> dict[str, Choices]:
        """The path of a training step: all choices alike, independently; now and then the largest."""
        config = self.config
        if config.largest_every and step % config.largest_every == 0:
            return dict.fromkeys(self.layers, LARGEST)
        random = Random(f"{config.seed}/path/{step}")
        return self.path_of(tuple(random.randrange(len(options)) for options in self.options))

    def set_path(self, path: dict[str, Choices]) -> None:
        """Puts a path to work."""
        for name, choices in path.items():
            self.layers[name].path["default"] = choices

    def set_path_at(self, position: int) -> None:
        """Puts the path to work of the optimizer step that the forward pass at this sample number belongs to."""
        step = position // (self.config.batch_size * self.config.gradient_accumulation)
        self.set_path(self.path_at(step))
