"""The methods that benchmarks/variants.py compares, and the size of each at which it trains as many numbers as plain LoRA."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rankfold import SubjectConfig
from rankfold.toolkit.adapters.attach import trainable_parameters
from rankfold.toolkit.core.errors import UserError
from rankfold.toolkit.diffusion.model import DiffusionModel
from rankfold.training.config.peft_config import peft_config
from rankfold.training.subject.adapter import attach_to_parts

RANKS = (*range(1, 17), *range(18, 33, 2), 40, 48, 64, 80, 96, 128)


@dataclass(frozen=True)
class Method:
    """An adapter with its options, and the options among which its size may be chosen."""

    adapter: str
    options: dict[str, str] = field(default_factory=dict)
    sizes: tuple[dict[str, str], ...] = ({},)
    """Option sets; each is tried with every rank."""


# FVAE's decoder and second encoder are trained and thrown away; at the reference's size they have to be narrow.
NARROW = ({"decoder_layers": "1", "decoder_width": "4", "encoder_width": "4"},)
METHODS: dict[str, Method] = {
    "lora": Method("lora"),
    "moslora": Method("moslora"),
    "moslora, frozen mixer": Method("moslora", {"mixer": "frozen"}),
    "fvae": Method("fvae", sizes=NARROW),
    "fvae, identity": Method("fvae", {"encoder_activation": "identity"}, sizes=NARROW),
    "loratrf": Method("loratrf", sizes=({"filter_r": "4"}, {"filter_r": "2"})),
    "tlora": Method("tlora"),
    "tlora, lora's start": Method("tlora", {"init": "lora"}),
    "deft": Method("deft"),
    "glora, matmul": Method("glora"),
    "glora, elementwise": Method("glora", {"form": "elementwise"}),
    "dora": Method("dora"),
    "gralora": Method("gralora"),
    "peanut": Method("peanut"),
    "oft": Method("oft"),
    "lokr": Method("lokr", sizes=({}, {"decompose_factor": "8"}, {"decompose_factor": "4"}, {"decompose_factor": "2"})),
}
SEARCHED = "glora, searched"


@dataclass(frozen=True)
class Sized:
    """A method at the rank and with the options that are trained."""

    method: str
    adapter: str
    rank: int
    options: dict[str, str]
    parameters: int

    def settings(self) -> dict[str, Any]:
        """For a SubjectConfig; alpha = rank, so that every method's own factor is 1."""
        return {
            "adapter": self.adapter,
            "rank": self.rank,
            "alpha": float(self.rank),
            "adapter_options": self.options,
        }


def count(model: DiffusionModel, config: SubjectConfig) -> int:
    """How many numbers the adapter of this config trains. The model is left as it was."""
    own = copy.copy(model)
    for name in (model.denoiser_name, *model.text_encoders()):
        setattr(own, name, copy.deepcopy(getattr(model, name)))
    parts: dict[str, nn.Module] = attach_to_parts(own, config, lambda targets: peft_config(config, targets))
    return sum(p.numel() for part in parts.values() for p in trainable_parameters(part))


def match_size(name: str, model: DiffusionModel, config: SubjectConfig, target: int) -> Sized:
    """The size of a method that is nearest to `target` trainable parameters."""
    method = METHODS[name]

    def count_at(rank: int, own: dict[str, str]) -> Sized:
        options = method.options | own
        made = replace(
            config, adapter=method.adapter, rank=rank, alpha=float(rank), dropout=0.0, adapter_options=options
        )
        return Sized(name, method.adapter, rank, options, count(model, made))

    found = []
    for own in method.sizes:
        for rank in RANKS:
            try:
                found.append(count_at(rank, own))
            except UserError:  # FVAE's loss has no lower bound at the smallest ranks
                continue
            if found[-1].parameters > 2 * target:
                break
    return min(found, key=lambda one: abs(one.parameters - target))
