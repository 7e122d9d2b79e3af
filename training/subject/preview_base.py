"""The preview base: a sibling of the base that is trained on, such as its distilled one, which images are drawn with while training.

It draws by its own stock pipeline, with its own denoiser, autoencoder, scheduler and text encoders; the adapter on it is the very one that
is in training. Its denoiser waits in main memory where the device has a memory of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ...toolkit.adapters.attach import adapter_layers
from ...toolkit.core.devices import has_own_memory
from ...toolkit.core.errors import UserError
from ...toolkit.core.modules import replace_module
from ...toolkit.diffusion.load import open_model
from ...toolkit.diffusion.model import DTYPES, DiffusionModel
from ..config.defaults import resolve_preview_base
from ..config.subject import SubjectConfig
from ..engine.block_swap import release_blocks, swap_blocks
from .adapter import SubjectAdapter
from .denoising import repeated_blocks
from .prompts import Prompts, preview_texts

FLAG = "--preview-base"


def check_preview_base(config: SubjectConfig, base: str) -> None:
    """Checks settings, and the adapted layers by their names and shapes alone. base: the folder of the one that is trained on.

    Raises:
        UserError: when the adapter does not fit the preview base, or a setting does not go with one.
    """
    own = resolve_preview_base(config.preview_base)
    if own == base:
        raise UserError(f"{FLAG} {config.preview_base} is the base that is trained on: leave it out.")
    others = {
        "--train-text-encoder": config.train_text_encoder,
        "--num-vectors": config.num_vectors,
        "--training-adapter": config.training_adapter is not None,
        "--shard-base": config.shard_base,
        "--prior-weight without --prior-folder": config.prior_weight and config.prior_folder is None,
    }
    for flag, given in others.items():
        if given:
            raise UserError(f"{FLAG} does not go with {flag}: leave one of the two out.")
    model, trained = (open_model(path, DTYPES[config.precision], "meta") for path in (own, base))
    model.check_side(config.resolution, f"{FLAG} {config.preview_base}: --resolution")
    model.check_steps(config.preview_steps, "--preview-steps")
    SubjectAdapter(config).attach(trained)
    check_layers(trained, model, config.preview_base)


def check_layers(trained: DiffusionModel, model: DiffusionModel, name: str) -> None:
    """Raises UserError when an adapted layer of the trained model has no counterpart of its shape in the other."""
    there = dict(model.denoiser.named_modules())
    for layer, adapted in adapter_layers(trained.denoiser).items():
        weight, own = adapted.get_base_layer().weight, getattr(there.get(layer), "weight", None)
        if own is None or own.shape != weight.shape:
            found = "no such layer" if own is None else f"{tuple(own.shape)} instead of {tuple(weight.shape)}"
            raise UserError(
                f"{FLAG} {name}: the adapter does not fit its {model.denoiser_name}, which has {found} at {layer}; take a sibling of the "
                "base, such as its distilled one."
            )


@dataclass(frozen=True)
class PreviewBase:
    """A loaded preview base."""

    model: DiffusionModel
    prompts: Prompts

    def share_adapter(self, denoiser: nn.Module) -> None:
        """Puts the adapter of a denoiser on this one: layers with the same parameters, around other frozen weights."""
        for name, layer in adapter_layers(denoiser).items():
            own = copy.copy(layer)
            own._modules = dict(layer._modules)  # type: ignore[attr-defined]
            own.base_layer = self.model.denoiser.get_submodule(name)
            own.training = False
            replace_module(self.model.denoiser, name, own)  # type: ignore[arg-type]

    def release(self) -> None:
        """Takes what has been drawn with off the device."""
        release_blocks(self.model.denoiser)


def load_preview_base(config: SubjectConfig, accelerator: Accelerator, texts: Sequence[str]) -> PreviewBase:
    """Loads it, its prompts encoded by its own text encoders, which are in memory only for that. texts: more prompts that will be drawn."""
    path, device = resolve_preview_base(config.preview_base), accelerator.device
    model = open_model(path, DTYPES[config.precision], device, config.quantize)
    prompts = Prompts(model, config, accelerator)
    prompts.add([*preview_texts(config), "", *texts])
    prompts.encode({})
    model.release()
    model.device = torch.device("cpu") if has_own_memory(device.type) else device
    denoiser = model.denoiser
    if has_own_memory(device.type):
        swap_blocks(denoiser, repeated_blocks(denoiser), device)
    model.device = device
    return PreviewBase(model, prompts)
