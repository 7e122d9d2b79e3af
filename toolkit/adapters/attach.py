"""Putting adapters on the parts of a pipeline, and taking their weights off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..core.errors import UserError
from ..core.modules import replace_module
from .base import AdapterLayer
from .plugin import pattern_value


def matching_layers(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the layers that the config's target_modules select."""
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def attach(model: nn.Module, config: PeftConfig, adapter: str = "default", *, field: str = "--target-modules") -> None:
    """Adds an adapter in fp32 on a frozen model.

    Raises:
        UserError: when the targets select no layer, or one that the adapter cannot be put on.
    """
    if not matching_layers(model, config):
        kinds = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"{field} {' '.join(sorted(config.target_modules))} matches no layer of {type(model).__name__}. "  # type: ignore[attr-defined]
            f"Its linear layers end in: {', '.join(kinds)}."
        )
    model.requires_grad_(False)
    try:
        add_adapter(model, config, adapter)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()


def add_adapter(model: nn.Module, config: PeftConfig, adapter: str) -> None:
    """Adds an adapter to a model and makes it the active one, through PEFT itself.

    The model's own `add_adapter` does the same behind a check of PEFT's version that a release of diffusers or transformers may
    set beyond any PEFT there is.

    Raises:
        ValueError: when the adapter cannot be put on a layer, or the model carries one of this name.
    """
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(f"there is an adapter '{adapter}' already")
    inject_adapter_in_model(config, model, adapter)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # the stock pipeline's own methods go by it
    set_active(model, [adapter])


def set_active(model: nn.Module, adapters: list[str]) -> None:
    """Makes these adapters the active ones and trainable, wherever they are; with none of them all adapters are off."""
    for module in adapter_modules(model):
        module.enable_adapters(bool(adapters))
        if adapters:
            known = isinstance(
                module, BaseTunerLayer
            )  # the others, trained in full, know only the adapters that bring them
            module.set_adapter([name for name in adapters if known or name in module._adapters])


def remove_adapters(model: nn.Module) -> None:
    """Takes every adapter off a model that `attach`, `add_adapter` or `add_adapter` put there, leaving its frozen layers."""
    for name, layer in adapter_layers_innermost_first(model):
        replace_module(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False  # type: ignore[assignment]


def remove_unused_adapters(model: nn.Module, adapter: str = "default") -> list[str]:
    """Takes the adapter off layers none of whose parameters has a gradient, to be called after a backward pass.

    Such layers have no part in the result (the last ones of a text encoder whose last states nobody reads). Their names are
    returned; the config then names the layers that are left.
    """
    layers = adapter_layers(model)
    dead = [
        name for name, layer in layers.items() if all(p.grad is None for p in layer.parameters() if p.requires_grad)
    ]
    for name in dead:
        replace_module(model, name, layers[name].get_base_layer())
    if dead:
        model.peft_config[adapter].target_modules = set(layers) - set(dead)  # type: ignore[index, union-attr]
    return dead


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], Any], adapter: str = "default") -> None:
    """Runs the model once and gives each layer that starts from it the mean of its base layer's output."""
    hooks, layers = [], [m for m in model.modules() if isinstance(m, AdapterLayer) and m.has_adapter(adapter)]
    layers = [layer for layer in layers if type(layer).calibrate is not AdapterLayer.calibrate]
    for layer in layers:

        def set_mean(module: nn.Module, inputs: Any, output: torch.Tensor, layer: AdapterLayer = layer) -> None:
            layer.calibrate(adapter, output.flatten(0, -2).float().mean(0))

        hooks.append(layer.base_layer.register_forward_hook(set_mean))
    try:
        if layers:
            run()
    finally:
        for hook in hooks:
            hook.remove()


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    adapter: str = "default",
    *,
    lora_plus_ratio: float = 1.0,
    lr_pattern: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer, one group for each learning rate that the variant asks for.

    lora_plus_ratio: factor on the rate of up-factors, in any variant (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    lr_pattern: factors by regular expressions on the layers' whole names, the first that matches.
    """
    layers = list(adapter_layers(model)) if lr_pattern else []
    factors: dict[int, float] = {}
    for layer in adapter_layers(model).values():
        if isinstance(layer, AdapterLayer) and layer.has_adapter(adapter):
            tensors = layer.tensors(adapter)
            for name, factor in layer.lr_multipliers(layer.settings[adapter]).items():
                if name in tensors:
                    factors[id(tensors[name])] = factor
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            up = lora_plus_ratio if f"_up.{adapter}" in name or f"lora_B.{adapter}" in name else 1.0
            layer = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
            own = pattern_value(lr_pattern or {}, layer, 1.0)
            groups.setdefault(own * up * factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": parameters, "lr": factor * learning_rate} for factor, parameters in groups.items()]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_layers_innermost_first(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The same as pairs, for what takes layers out: where two variants adapt one layer, the later one holds the earlier."""
    return list(reversed(adapter_layers(model).items()))


def adapter_modules(model: nn.Module) -> list[Any]:
    """What carries an adapter: its layers, and modules that are trained in full (modules_to_save)."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def disable_adapters(*models: nn.Module) -> Iterator[None]:
    """Within the block the models compute what they would without any adapter."""
    layers = [layer for model in models for layer in adapter_modules(model) if not layer._disable_adapters]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also take the parameters out of training
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_state(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Copies of the adapter's own tensors, named as PEFT names them in a file."""
    return {key: value.detach().cpu().clone() for key, value in adapter_tensors(model, adapter).items()}


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's own tensors by those names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return in_use(model, get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))


def in_use(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in a file -> those that an adapter needs in use, and not only in training."""
    kinds = [layer for layer in adapter_layers(model).values() if isinstance(layer, AdapterLayer)]
    left_out = tuple({layer.attribute(tensor) for layer in kinds for tensor in layer.training_only})
    return {name: tensor for name, tensor in state.items() if not name.rpartition(".")[2].startswith(left_out)}


def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor], adapter: str = "default") -> None:
    """Loads what `adapter_state` gave.

    Raises:
        UserError: when the tensors do not fit the adapter.
    """
    # A PeftModel's names begin with this, those of a model with injected layers do not, and files always do.
    own = {name.removeprefix("base_model.model."): name for name in adapter_tensors(model, adapter)}
    given = {name.removeprefix("base_model.model."): tensor for name, tensor in in_use(model, state).items()}
    if strange := sorted(set(given) - set(own)):
        raise UserError(f"The adapter does not fit this base model: it has no place for {strange[0]}.")
    if lacking := sorted(set(own) - set(given)):
        raise UserError(f"The adapter's file lacks {len(lacking)} tensors, such as {lacking[0]}: it is incomplete.")
    try:
        set_peft_model_state_dict(model, {own[name]: tensor for name, tensor in given.items()}, adapter_name=adapter)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"The adapter does not fit this base model: {str(error).splitlines()[-1].strip()}") from error
