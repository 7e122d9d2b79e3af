"""Adapters with random tensors, and small models to put them on."""

import torch
from torch import nn

from rankfold.toolkit.adapters.base import REGISTRY
from rankfold.toolkit.adapters.registry import BASELINES, make_config

NOT_LINEAR = ("fvae", "loratrf", "loratrf-code", "tlora", "tlora-lora")  # cannot be merged

EXTRA = {
    "moslora-frozen": ("moslora", {"mixer": "frozen"}),
    "fvae-identity": ("fvae", {"encoder_activation": "identity"}),
    "loratrf-code": ("loratrf", {"filter": "code"}),
    "loratrf-edit": ("loratrf", {"filter": "edit"}),
    "loratrf-subspace": ("loratrf", {"filter": "subspace"}),
    "tlora-lora": ("tlora", {"init": "lora"}),
    "deft-qr": ("deft", {"form": "qr"}),
    "glora-elementwise": ("glora", {"form": "elementwise"}),
    "glora-vectors": ("glora", {"a": "vector", "b": "vector", "c": "lora", "d": "constant", "e": "constant"}),
    "glora-constants": ("glora", {"form": "elementwise", "a": "constant", "b": "constant"}),
}
ONE_BLOCK = {"gralora_k": "1"}  # the layers here have five outputs, which no blocks share
VARIANTS = {name: (name, {}) for name in REGISTRY} | EXTRA


def config(label, **changes):
    name, options = VARIANTS.get(label, (label, ONE_BLOCK if label == "gralora" else {}))
    dropout = 0.0
    alpha = 6.0 if "alpha" in getattr(BASELINES.get(name), "field_names", ("alpha",)) else 4.0
    settings = {"rank": 4, "alpha": alpha, "dropout": dropout, "target_modules": ("0", "2"), "options": options}
    return make_config(name, **(settings | changes))


def randomize(model, seed=1, std=0.3):
    """Gives every trainable tensor a value, so that nothing is zero by its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model


def two_linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def two_convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
