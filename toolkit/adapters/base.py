"""The adapter contract, and how a variant becomes an ordinary PEFT method.

A variant states its formula once, in `low_rank`: from its own tensors it gives the two factors of

    y = base(x) + scaling * up(down(dropout(x))),        down (r, in), up (out, r)

Forward, merge, unmerge, strength, several adapters at once, convolutions, saving and the fold to plain LoRA are derived
from that here. A convolution's down factor is (r, in/groups, kh, kw) seen as (r, in * kh * kw); its up factor is 1 x 1.

Registration is by existing: `class MosLoraLayer(AdapterLayer, name="moslora", config=...)` is enough for
`get_peft_model`, `unet.add_adapter`, `PeftModel.from_pretrained`, `save_pretrained` and the rest of stock PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

REGISTRY: dict[str, type[AdapterLayer]] = {}


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that every variant has. Sub-classes add their own and set `peft_type` through the registry."""

    r: int = field(default=8, metadata={"help": "Rank: width of the bottleneck, 1 or more."})
    alpha: float | None = field(
        default=None, metadata={"help": "The change is multiplied by alpha / r. Unset means alpha = r, so 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter, 0 to below 1."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regular expression) of the layers to adapt."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers trained and saved in full."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt; unset means all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer name."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alpha by layer name."})
    bias: str = field(default="none", metadata={"help": "Only 'none': the base model's biases stay as they are."})

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = type(self).name.upper()  # type: ignore[assignment]
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is the rank and must be a whole number of at least 1, not {self.r!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and below 1, not {self.dropout!r}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha!r}.")
        if self.bias != "none":
            raise ValueError("bias must be 'none': this adapter does not train the base model's biases.")


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A Linear or Conv2d with any number of adapters of one variant on it."""

    name: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    trained: ClassVar[tuple[str, ...]]  # names of the variant's tensors, without the prefix

    other_param_names = ("r", "alpha", "scaling", "adapter_dropout")

    def __init_subclass__(cls, *, name: str, config: type[AdapterConfig], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name, cls.config_class, config.name = name, config, name
        cls.adapter_layer_names = tuple(f"{name}_{tensor}" for tensor in cls.trained)
        REGISTRY[name] = cls
        register(cls)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.adapter_dropout = nn.ModuleDict()
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.frozen_peft_weight_names = {}
        self.unmerged_weight: torch.Tensor | None = None
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters = []

    # -------------------------------------------------------------------------- what a variant says

    def create(self, config: AdapterConfig, r: int, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
        """The variant's tensors at the start of training, in the order of `trained`."""
        raise NotImplementedError

    def frozen(self, config: AdapterConfig) -> tuple[str, ...]:
        """Names of tensors that are not trained under this config."""
        return ()

    def low_rank(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula: the variant's tensors -> down (r, in), up (out, r), before the scaling."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- what follows from it

    def update_layer(self, adapter: str, config: AdapterConfig, r: int, alpha: float) -> None:
        """Adds an adapter of this name."""
        base = self.get_base_layer()
        fan_in, fan_out = fans(base)
        self.r[adapter], self.alpha[adapter], self.scaling[adapter] = r, alpha, alpha / r
        self.adapter_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for tensor, value in self.create(config, r, fan_in, fan_out).items():
            getattr(self, f"{self.name}_{tensor}")[adapter] = nn.Parameter(value)
        self.frozen_peft_weight_names[adapter] = tuple(f"{self.name}_{tensor}" for tensor in self.frozen(config))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters or [adapter], inference_mode=config.inference_mode)

    def tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """The variant's own tensors of one adapter."""
        return {tensor: getattr(self, f"{self.name}_{tensor}")[adapter] for tensor in self.trained}

    def has(self, adapter: str) -> bool:
        """Whether this layer carries the adapter."""
        return adapter in self.scaling

    def fold(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain LoRA factors in fp32, scaling baked into up: delta weight = up @ down."""
        down, up = self.low_rank({key: value.detach().float() for key, value in self.tensors(adapter).items()})
        return down, up * self.scaling[adapter]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change of the base weight, in its shape, fp32."""
        down, up = self.fold(adapter)
        return (up @ down).view(self.get_base_layer().weight.shape)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in), or (B, in, H, W) for a convolution."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if self.has(adapter):
                result = result + self.contribution(adapter, x).to(result.dtype)
        return result

    def contribution(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """What one adapter adds to the output."""
        down, up = self.low_rank(self.tensors(adapter))
        x = self.adapter_dropout[adapter](self._cast_input_dtype(x, down.dtype))
        # Scaling the small factor instead of the output saves a full-size tensor.
        up = up if self.scaling[adapter] == 1 else up * self.scaling[adapter]
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Linear):
            return F.linear(F.linear(x, down), up)
        kernel = down.view(-1, *base.weight.shape[1:])
        hidden = F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)
        return F.conv2d(hidden, up[:, :, None, None])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight. The original is kept, so `unmerge` is exact to the bit.

        Raises:
            ValueError: with `safe_merge`, if the merged weight is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.has(adapter):
                continue
            weight = self.get_base_layer().weight
            merged = (weight.data.float() + self.get_delta_weight(adapter).to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"Adapter '{adapter}' has values that are not finite; it was not merged.")
            if self.unmerged_weight is None:
                self.unmerged_weight = weight.data
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Puts the original base weight back."""
        if self.unmerged_weight is not None:
            self.get_base_layer().weight.data = self.unmerged_weight
            self.unmerged_weight = None
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength: 1 is as trained, 0 is off."""
        if self.has(adapter):
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in self.active_adapters:
            if self.has(adapter):
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters, or sets it back to 1."""
        for adapter in self.active_adapters:
            if self.has(adapter):
                if scale is None:
                    self.set_scale(adapter, 1.0)
                else:
                    self.scaling[adapter] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def fans(base: nn.Module) -> tuple[int, int]:
    """Inputs of one output, and outputs, of a Linear or Conv2d."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    if isinstance(base, nn.Conv2d) and base.groups == 1 and base.padding_mode == "zeros":
        return base.in_channels * math.prod(base.kernel_size), base.out_channels
    raise ValueError(
        f"Cannot adapt a {type(base).__name__} layer: choose target_modules that name Linear or Conv2d layers."
    )


class AdapterTuner(BaseTuner):
    """The PEFT tuner of a variant; one sub-class a variant is made by `register`."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
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
        layer = self.tuner_layer_cls(target)
        layer.update_layer(adapter_name, peft_config, r, alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def by_pattern(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the pattern that matches the layer's name, or the default."""
    return pattern.get(get_pattern_key(pattern.keys(), key), default)


def register(layer: type[AdapterLayer]) -> None:
    """Makes the variant known to PEFT under its upper-case name."""
    tuner = type(
        f"{layer.name.capitalize()}Model", (AdapterTuner,), {"prefix": f"{layer.name}_", "tuner_layer_cls": layer}
    )
    kind = layer.name.upper()
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = layer.config_class  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = f"{layer.name}_"  # type: ignore[index]
