"""How a variant becomes an ordinary PEFT method: the tuner, and its place in PEFT's tables."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .auxiliary import put_loss_into_output


class AdapterTuner(BaseTuner):
    """The PEFT tuner of a variant; one sub-class a variant is made by `register`."""

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
        r = by_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = by_pattern(peft_config.alpha_pattern, current_key, peft_config.alpha or r)
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
            put_loss_into_output(self.model)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What goes into a file: all of the adapter's tensors but those that only training needs."""
        state = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        left_out = tuple(f".{cls.prefix}{name}" for name in cls.tuner_layer_cls.training_only)
        return {key: value for key, value in state.items() if not any(name in key for name in left_out)}


def by_pattern(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the pattern that matches the layer's name, or the default."""
    return pattern.get(get_pattern_key(pattern.keys(), key), default)


def register(kind: str, name: str, config: type, layer: type) -> None:
    """Makes a variant known to PEFT."""
    tuner = type(f"{name.capitalize()}Model", (AdapterTuner,), {"prefix": f"{name}_", "tuner_layer_cls": layer})
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = f"{name}_"  # type: ignore[index]
