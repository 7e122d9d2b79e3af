"""The adapter contract, and what follows from it.

A variant states its formula once:

- in `change` if it is linear in its input: from its own tensors, and the frozen weight and bias where it needs them, to a
  Change;
- in `nonlinear_delta` if not: from its tensors, the input and the base layer's output to what is added.

Forward, merge, unmerge, strength, several adapters at once, convolutions, quantised bases, saving and the fold to plain
LoRA are derived from that here and in change.py. Registration is by existing:
`class MosLoraLayer(AdapterLayer, name="moslora", config=MosLoraConfig)` is enough for `get_peft_model`,
`unet.add_adapter`, `PeftModel.from_pretrained`, `save_pretrained` and the rest of stock PEFT (see plugin.py).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.change import (
    CONVOLUTIONS,
    Change,
    add_projection,
    apply_change,
    apply_weight,
    is_frozen_and_unhooked,
    joint_forward,
)
from .plugin import AdapterType, register_peft_method
from .quantized import WeightSnapshot, find_backend, is_plain, unpack_cpu_weight

REGISTRY: dict[str, type[AdapterLayer]] = {}


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that every variant has. Sub-classes add their own."""

    r: int = field(default=8, metadata={"help": "Rank of the low-rank update, 1 or more."})
    alpha: float | None = field(
        default=None, metadata={"help": "The change is multiplied by alpha / r. Unset means alpha = r, so 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter, in [0, 1)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regular expression) of the layers to adapt."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers trained and saved in full."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Block indices to adapt; unset means all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform indexes."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer name."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alpha by layer name."})
    bias: str = field(
        default="none",
        metadata={
            "help": "Biases of the base model that are trained and saved, too: none, all, or those of the adapted layers "
            "(the type in small letters and _only, such as moslora_only)."
        },
    )
    keep_unmerged: bool = field(
        default=True,
        metadata={
            "help": "Keep the base weights of merged layers in main memory, so that unmerging is exact to the bit; "
            "without it the change is subtracted again, which rounds."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start as the base model. False starts away from it, at random: for tests, not for training."
        },
    )

    kind: ClassVar[str] = ""
    uses_base_weight: ClassVar[bool] = False
    """Whether the change depends on the weight that it is merged into, so that only a kept copy leads back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType(type(self).kind)  # type: ignore[assignment]
        for name, r in {"r": self.r, **{f"rank_pattern['{k}']": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{name} is the rank and must be a whole number of at least 1, not {r!r}.")
        for name, a in {
            "alpha": self.alpha,
            **{f"alpha_pattern['{k}']": v for k, v in self.alpha_pattern.items()},
        }.items():
            if a is not None and not a > 0:
                raise ValueError(f"{name} must be above 0, not {a!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}.")
        if self.uses_base_weight and not self.keep_unmerged:
            name = type(self).__name__.removesuffix("Config")
            raise ValueError(f"keep_unmerged must stay on: {name}'s change depends on the weight it is merged into.")
        self.check_choice("bias", ("none", "all", f"{self.kind.lower()}_only"))

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises ValueError when the field is none of the choices."""
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")

    def check_minimum(self, name: str, minimum: float) -> None:
        """Raises ValueError when the field is below its least value."""
        value = getattr(self, name)
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value!r}.")


class NotLinearError(NotImplementedError, ValueError):
    """An adapter that is not linear in its input cannot become a change of the weight.

    Of the kind that PEFT raises for methods that cannot be merged, and a ValueError, since another config could be.
    """


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer with any number of adapters of one variant on it."""

    name: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    supported_layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS)
    """Base layers that the variant can be put on. transformers' Conv1D is a linear layer whose weight is stored (in, out)."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of tensors that only training needs: a layer that is loaded to be used goes without them."""
    follows_noise: ClassVar[bool] = False
    """Whether the formula depends on how noisy the latents are (noise_level.py), so that it is for diffusion models alone."""
    auxiliary_only: ClassVar[tuple[str, ...]] = ()
    """Those of them that the task's loss does not reach. They are parameters outside the method's prefix, by which PEFT knows what
    every step trains."""

    other_param_names = ("r", "alpha", "scaling", "settings", "adapter_dropout")

    def __init_subclass__(
        cls,
        *,
        name: str = "",
        config: type[AdapterConfig] | None = None,
        kind: str = "",
        listed: bool = True,
        **kwargs: Any,
    ) -> None:
        """name: the variant's, and the prefix of its tensors; kind: its type in PEFT, by default the name in capitals.

        listed: whether users choose it by name.
        """
        super().__init_subclass__(**kwargs)
        if config is not None:
            cls.name, cls.config_class, config.kind = name, config, kind or name.upper()
            if listed:
                REGISTRY[name] = cls
            register_peft_method(AdapterType(config.kind), name, config, cls)

    def __init__(self, base_layer: nn.Module, layer_name: str = "", model: nn.Module | None = None) -> None:
        """layer_name: as messages call it; model: the one that it is a layer of."""
        super().__init__()
        self.base_layer, self.layer_name = base_layer, layer_name
        self.quantization_backend = find_backend(self.get_base_layer(), model)
        self.is_plain_linear = is_plain(base_layer)  # settled here: a forward pass asks no more than it must
        (self.fan_in, self.fan_out), (self.in_features, self.out_features) = self.sizes()
        self.attributes: dict[str, str] = {}  # of the variant's tensors, by their own names
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self.adapter_dropout = nn.ModuleDict()
        self.adapter_layer_names: tuple[str, ...] = ()
        self.frozen_peft_weight_names = {}
        self.unmerged_weight: torch.Tensor | WeightSnapshot | None = None
        self.unmerged_bias: torch.Tensor | None = None
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters = []

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((inputs of one output, outputs), (features or channels that come in, that go out)) of the base layer.

        Raises:
            ValueError: for a layer that the variant cannot adapt.
        """
        base = self.get_base_layer()
        return fan_in_out(base, self.supported_layers, self.name), features(base)

    # -------------------------------------------------------------------------- what a variant says

    def init_tensors(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """The variant's tensors at the start of training, name -> (any shape), in fp32; they change nothing yet.

        Shapes follow from r, self.fan_in and self.fan_out. What names mean: docs/adding-an-adapter.md.
        """
        raise NotImplementedError

    def frozen_tensors(self, config: Any) -> tuple[str, ...]:
        """Names of tensors that are not trained under this config."""
        return ()

    def lr_multipliers(self, config: Any) -> dict[str, float]:
        """Factors on the learning rate of single tensors."""
        return {}

    def is_linear(self, adapter: str) -> bool:
        """Whether `change` is the formula just now; otherwise it is `nonlinear_delta`."""
        return True

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        """The formula of a linear variant, before the scaling.

        Raises:
            NotLinearError: when the variant is not linear under its config; the sentence says why and what to do.
        """
        raise NotImplementedError

    def input_projection(self, adapter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The matrix (k, in) through which `nonlinear_delta` reads the layer's input."""
        raise NotImplementedError

    def nonlinear_delta(
        self, adapter: str, tensors: dict[str, torch.Tensor], projected: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula of any other, for projected = x @ input_projection.T (..., k), x (..., in) and the base's output y (..., out).

        Returns a code (..., m) and the matrix (out, m) that takes it to what is added to y, before the scaling.
        """
        raise NotImplementedError

    def nearest_change(self, adapter: str) -> Change | None:
        """What a variant that is not linear is best exported as, before the scaling; None: what is fitted to its effect."""
        return None

    def calibrate(self, adapter: str, mean: torch.Tensor) -> None:
        """Takes the base layer's mean output (out,) over a batch, for variants that start from it."""

    # -------------------------------------------------------------------------- adapters come and go

    def update_layer(self, adapter: str, config: AdapterConfig, r: int, alpha: float) -> None:
        """Adds an adapter of this name."""
        if r > min(self.fan_in, self.fan_out):
            warnings.warn(
                f"rank {r} is larger than the layer {self.layer_name or ''} ({self.fan_in} to {self.fan_out}): "
                f"r of at most {min(self.fan_in, self.fan_out)} can do the same; rank_pattern sets it for a layer.",
                stacklevel=2,
            )
        self.r[adapter], self.alpha[adapter], self.settings[adapter] = r, alpha, config
        self.scaling[adapter] = self.initial_scaling(adapter)
        self.adapter_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.adapter_dropout[adapter].train(self.training)
        for tensor, value in self.init_tensors(config, r).items():
            self.put(adapter, tensor, value if config.init_weights else away_from_zero(value))
        self.frozen_peft_weight_names[adapter] = tuple(self.attribute(tensor) for tensor in self.frozen_tensors(config))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters or [adapter], inference_mode=config.inference_mode)

    def attribute(self, tensor: str) -> str:
        """The attribute that holds the tensor of this name, or the beginning of those that hold tensors of this beginning."""
        return f"{'auxiliary' if tensor.startswith(self.auxiliary_only) else self.name}_{tensor}"

    def put(self, adapter: str, tensor: str, value: torch.Tensor) -> None:
        """Makes a parameter of the adapter of one of the variant's tensors, of the shape that `init_tensors` gives.

        Raises:
            TypeError: for a name that the layer uses itself.
        """
        attribute = self.attributes.setdefault(tensor, self.attribute(tensor))
        if attribute not in self.adapter_layer_names:
            if hasattr(self, attribute):
                raise TypeError(f"the tensor '{tensor}' of {self.name} would hide {attribute} of the layer: rename it.")
            setattr(self, attribute, nn.ParameterDict())
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        getattr(self, attribute)[adapter] = nn.Parameter(value)

    def make_room(self, adapter: str, given: dict[str, torch.Tensor]) -> None:
        """Adds parameters for those of the given tensors, named as in a file, that only training needs and that the layer lacks."""
        present = self.tensors(adapter)
        like = next(iter(present.values()))
        for attribute, value in given.items():
            tensor = attribute.partition("_")[2]
            known = tensor.startswith(self.training_only) and self.attribute(tensor) == attribute
            if known and tensor not in present:
                self.put(adapter, tensor, value.to(like.device, like.dtype, copy=True))
                getattr(self, attribute)[adapter].requires_grad_(like.requires_grad)

    def initial_scaling(self, adapter: str) -> float:
        """The scaling at strength 1."""
        return self.alpha[adapter] / self.r[adapter]

    def tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """The variant's own tensors of one adapter."""
        return {
            tensor: values[adapter]
            for tensor, attribute in self.attributes.items()
            if adapter in (values := getattr(self, attribute))
        }

    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer carries the adapter."""
        return adapter in self.scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength: 1 is as trained, 0 is off."""
        if self.has_adapter(adapter):
            self.scaling[adapter] = scale * self.initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters, or sets it back to 1."""
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                if scale is None:
                    self.set_scale(adapter, 1.0)
                else:
                    self.scaling[adapter] /= scale

    # -------------------------------------------------------------------------- the frozen layer

    def base_weight(self) -> torch.Tensor:
        """The frozen weight (out, in) as it was before any merge, dequantised."""
        if isinstance(self.unmerged_weight, torch.Tensor):
            return self.as_matrix(self.unmerged_weight.to(self.get_base_layer().weight.device))
        base = self.get_base_layer()
        unpack_cpu_weight(base)
        if isinstance(self.unmerged_weight, WeightSnapshot):
            with self.unmerged_weight.restored_temporarily(base):
                return self.as_matrix(self.get_base_weight())
        return self.as_matrix(self.get_base_weight())

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the base layer's shape as (out, in)."""
        return weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight.flatten(1)

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) in the base layer's shape, unpacked."""
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            return matrix.t().contiguous()
        return matrix.view(base.weight.shape) if isinstance(base, CONVOLUTIONS) else matrix

    def base_bias(self) -> torch.Tensor | None:
        """The frozen bias (out,) as it was before any merge."""
        return self.unmerged_bias if self.merged_adapters else self.get_base_layer().bias  # type: ignore[return-value]

    # -------------------------------------------------------------------------- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in), or (B, in, ...) for a convolution.

        Raises:
            ValueError: for `adapter_names` (another adapter for each row), which these variants do not offer.
        """
        if "adapter_names" in kwargs:
            raise ValueError(f"{self.name} cannot use another adapter for each row; set one with set_adapter.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self.forward_with_adapters([a for a in self.active_adapters if self.has_adapter(a)], x, *args, **kwargs)

    def forward_with_adapters(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output (..., out) of x (..., in) with these adapters: the linear ones' changes as one, then the effects of the others."""
        linear = [adapter for adapter in adapters if self.is_linear(adapter)]
        effects = [adapter for adapter in adapters if adapter not in linear]
        dropped = {adapter for adapter in adapters if self.training and self.settings[adapter].dropout}
        total = Change.sum([self.scaled_change(adapter) for adapter in linear if adapter not in dropped])
        readers = {a: self.input_projection(a, self.tensors(a)) for a in effects}
        joint, rest = (Change(), total) if effects else (total, Change())  # effects look at the base layer's own output
        kept = {a: matrix for a, matrix in readers.items() if a not in dropped}
        plain, reads = self.base_output_and_projections(x, joint, kept, args, kwargs)
        y, base = self.apply_change(rest, x, plain), self.get_base_layer()
        for adapter in linear:
            if adapter in dropped:
                y = self.apply_change(self.scaled_change(adapter), self.adapter_dropout[adapter](x), y)
        for adapter in effects:
            seen = self.adapter_dropout[adapter](x)
            read = reads[adapter] if adapter in reads else apply_weight(base, seen, readers[adapter].to(x.dtype))
            code, up = self.nonlinear_delta(adapter, self.tensors(adapter), read, seen, plain)
            y = add_projection(base, y, code, self.scaling[adapter] * up)
        return y

    def scaled_change(self, adapter: str) -> Change:
        """The change at the present strength."""
        return self.change(adapter, self.tensors(adapter)).scale(self.scaling[adapter])

    def base_output_and_projections(
        self, x: torch.Tensor, change: Change, projections: dict[str, torch.Tensor], args: Any, kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The base layer's output under the change, and x through each reader (k, in)."""
        if self.is_plain_linear and is_frozen_and_unhooked(self.base_layer) and not args and not kwargs:
            y, reads = joint_forward(self.base_layer, x, change, list(projections.values()))
        else:
            y = self.base_layer(x, *args, **kwargs)
            if self.quantization_backend is not None:
                y = self.quantization_backend.maybe_clone_base_result(y)
            y = self.apply_change(change, x, y)
            reads = [apply_weight(self.get_base_layer(), x, matrix.to(x.dtype)) for matrix in projections.values()]
        return y, dict(zip(projections, reads, strict=True))

    def apply_change(self, change: Change, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The base layer's output y (..., out) of x (..., in) -> the changed layer's, of the same shape."""
        return apply_change(self.get_base_layer(), change, x, y, self.base_weight)

    # -------------------------------------------------------------------------- merge and fold

    def fold(self, adapter: str) -> Change:
        """The adapter's change as trained (strength 1), at least in fp32, scaling baked in.

        Raises:
            NotLinearError: when the variant is not linear.
            ValueError: when the base model's own biases were trained with it, which are no part of the change.
        """
        if self.settings[adapter].bias != "none":
            raise ValueError(
                f"The adapter was trained with bias='{self.settings[adapter].bias}', and its biases of the base model have no place "
                "in its change: merge it into the model, or keep it as an adapter."
            )
        return self.exact_change(adapter).scale(self.initial_scaling(adapter))

    @torch.no_grad()
    def exact_change(self, adapter: str) -> Change:
        """The change before the scaling, at least in fp32."""
        return self.change(adapter, {key: at_least_fp32(value) for key, value in self.tensors(adapter).items()})

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change of the base weight at the present strength, in its shape, at least fp32."""
        delta = self.exact_change(adapter).scale(self.scaling[adapter]).delta_weight(at_least_fp32(self.base_weight()))
        return self.as_stored(delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapters' change into the base weight (and bias).

        The weight before the first merge is kept in main memory, so that `unmerge` is exact to the bit, unless a config
        says keep_unmerged=False. All changes are taken from that weight, however many merges there are.

        Raises:
            NotLinearError: for a variant that is not linear.
            ValueError: with `safe_merge`, if the merged weight is not finite.
        """
        names = [adapter for adapter in check_adapters_to_merge(self, adapter_names) or [] if self.has_adapter(adapter)]
        if not names:
            return
        keep = all(self.settings[adapter].keep_unmerged for adapter in (*self.merged_adapters, *names))
        wanted = [*self.merged_adapters, *names] if keep else names
        old_weight, old_bias = self.base_weight(), self.base_bias()
        total = Change()
        for adapter in wanted:
            total = total + self.exact_change(adapter).scale(self.scaling[adapter])
        weight = at_least_fp32(old_weight) + total.delta_weight(at_least_fp32(old_weight))
        bias = self.get_base_layer().bias if not keep else old_bias
        if total.bias is not None:
            bias = total.bias if bias is None else at_least_fp32(bias) + total.bias
        if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(wanted)} seems to be broken: "
                "its values are not finite, and nothing was merged."
            )
        if not self.merged_adapters:
            self.unmerged_bias = old_bias
            if keep:
                base = self.get_base_layer()
                self.unmerged_weight = (
                    base.weight.data.cpu() if self.quantization_backend is None else WeightSnapshot.capture(base)
                )
        self.set_base(weight.to(old_weight.dtype), bias)
        self.merged_adapters.extend(names)

    def set_base(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Sets weight (out, in) and bias of the base layer."""
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            self.set_base_weight(self.as_stored(weight))
        else:
            base.weight.data = self.as_stored(weight).to(base.weight.device)
        if bias is not base.bias:
            base.bias = (
                None if bias is None else nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)
            )

    def unmerge(self) -> None:
        """Puts the base weight (and bias) back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, weight, bias = self.get_base_layer(), self.unmerged_weight, self.unmerged_bias
        if isinstance(weight, WeightSnapshot):
            weight.restore(base)
        elif weight is None:
            weight = self.base_weight()
            for adapter in self.merged_adapters:
                weight = at_least_fp32(weight) - self.as_matrix(self.get_delta_weight(adapter))
            self.set_base(weight.to(base.weight.dtype), bias)
        else:
            base.weight.data = weight.to(base.weight.device)
        if bias is not base.bias:
            base.bias = bias
        self.unmerged_weight = self.unmerged_bias = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into plain LoRA."""
        try:
            change = self.exact_change(adapter_name)
        except ValueError:
            return False
        return change.is_low_rank and change.bias is None  # PEFT takes over the weight's change only


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of any shape, in fp32, or as it is when it is finer."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def away_from_zero(start: torch.Tensor) -> torch.Tensor:
    """The start of a tensor of any shape; one that is all zeros is drawn at random."""
    return start if start.is_meta or start.any() else nn.init.normal_(start, std=0.02)


def is_projection(base: nn.Module) -> bool:
    """Whether a layer is one that variants can adapt in general: linear, or a plain convolution."""
    try:
        fan_in_out(base, AdapterLayer.supported_layers, "")
    except ValueError:
        return False
    return True


def features(base: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a base layer: features, or channels of a convolution."""
    if isinstance(base, CONVOLUTIONS):
        return base.in_channels, base.out_channels
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return base.in_features, base.out_features  # type: ignore[return-value]


def fan_in_out(base: nn.Module, supported_layers: tuple[type[nn.Module], ...], name: str) -> tuple[int, int]:
    """Inputs of one output, and outputs, of a base layer.

    Raises:
        ValueError: for a layer that the variant cannot adapt.
    """
    linear = isinstance(base, Conv1D) or (hasattr(base, "in_features") and hasattr(base, "out_features"))
    if nn.Linear in supported_layers and linear:
        return features(base)
    if (
        isinstance(base, CONVOLUTIONS)
        and isinstance(base, supported_layers)
        and base.groups == 1
        and base.padding_mode == "zeros"
    ):
        return base.in_channels * math.prod(base.kernel_size), base.out_channels
    able = " or ".join(kind.__name__ for kind in supported_layers)
    raise ValueError(
        f"{name} cannot adapt a {type(base).__name__} layer: choose target_modules that name {able} layers."
    )
