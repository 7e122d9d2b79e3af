"""How a variant becomes an ordinary PEFT method: the tuner, and its place in PEFT's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .auxiliary import add_loss_to_output


class AdapterType(str):
    """A type beside those of PEFT's closed enum, PeftType; it answers as its members do and is stored as a plain string."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.value}"


class AdapterTuner(BaseTuner):
    """The PEFT tuner of a variant; one subclass per variant is made by `register_peft_method`."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        r = pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = pattern_value(peft_config.alpha_pattern, current_key, peft_config.alpha or r)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        layer = self.tuner_layer_cls(target, current_key, self.model)
        layer.update_layer(adapter_name, peft_config, r, alpha)
        layer.train(target.training)  # a model in eval mode stays in it
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own, but for modules that are trained in full: it wants a weight of them, which a projector of several layers
        does not have."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        if self.tuner_layer_cls.training_only:
            add_loss_to_output(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Refuses what PEFT would drop without a word, since no layer gets to see it.

        Raises:
            ValueError: for `adapter_names` (another adapter for each row).
        """
        if adapter_names is not None:
            raise ValueError(
                f"{self.tuner_layer_cls.name} cannot use another adapter for each row; set one with set_adapter."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """PEFT's own, behind making room for tensors that only training needs where the file brings them: a layer that is
        loaded to be used has none."""
        if cls.tuner_layer_cls.training_only:
            for name, layer in model.named_modules():
                if isinstance(layer, cls.tuner_layer_cls) and layer.has_adapter(adapter_name):
                    start = name.removeprefix("base_model.model.") + "."
                    given = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
                    layer.make_room(
                        adapter_name, {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
                    )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the pattern that matches the layer's name, or the default."""
    return pattern.get(get_pattern_key(pattern.keys(), key), default)


def register_peft_method(kind: AdapterType, name: str, config: type, layer: type) -> None:
    """Makes a variant known to PEFT.

    Raises:
        TypeError: for a kind that PEFT has a method of itself.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)  # type: ignore[call-overload]
    if known is not None and known.__module__.startswith("peft."):
        raise TypeError(f"PEFT has a method of the kind {kind.value}: give the class kind='RANKFOLD_{kind.value}'.")
    tuner = type(f"{name.capitalize()}Model", (AdapterTuner,), {"prefix": f"{name}_", "tuner_layer_cls": layer})
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = f"{name}_"  # type: ignore[index]
