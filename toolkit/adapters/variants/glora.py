"""GLoRA: generalised weights, prompts, scales and shifts for each layer (Chavan et al. 2023, arXiv 2306.07967).

    y = (W + A-term + B) x + b + W C + D * b + E

Each of the five has its own choice for each layer; what is chosen "none" has no tensors:

    A   lora: W @ (a_up @ a_down) in the matmul form, W * (a_up @ a_down) in the elementwise form of the released code;
        vector: a factor for each row of W; constant: one factor
    B   lora: b_up @ b_down; vector: b_up[:, None] * ones, the same for all inputs; constant: one number everywhere
    C   lora: c_up @ c_down, or vector: (in,)
    D   vector (out,) or constant: a factor for each bias
    E   vector (out,) or constant: added to the bias

Everything folds into weight and bias, so inference costs nothing. There is no alpha / r unless alpha is set. The matmul form
with A and B lora or none is plain LoRA of rank 2 r (and a bias), so it is the default; elementwise A is of full rank. On a
layer without a bias, D does nothing, and C and E give it one.

Use it with a structure found by search, or where biases matter. Deviations from the released code: the five choices are
independent and fixed by the config, W C always uses the weight before any merge, layers without a bias keep their C and E,
nothing of the weight's size is kept for the backward pass, and A may have a learning rate of its own (a_rate), since a step
of it moves the weight by that step times W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ...core.change import Change
from ..base import AdapterConfig, AdapterLayer

CHOICES = {
    "a": ("lora", "vector", "constant", "none"),
    "b": ("lora", "vector", "constant", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "constant", "none"),
    "e": ("vector", "constant", "none"),
}
FORMS = ("matmul", "elementwise")


@dataclass
class GloraConfig(AdapterConfig):
    """Config of GLoRA; registered in PEFT as RANKFOLD_GLORA, beside PEFT's own GLORA."""

    uses_base_weight: ClassVar[bool] = True

    form: str = field(
        default="matmul",
        metadata={"help": "How A meets W: matmul (W @ A, folds into LoRA) or elementwise (W * A, the released code)."},
    )
    a: str = field(default="lora", metadata={"help": "Weight scale A: lora, vector, constant or none."})
    b: str = field(default="lora", metadata={"help": "Weight shift B: lora, vector, constant or none."})
    c: str = field(default="vector", metadata={"help": "Prompt C: lora, vector or none."})
    d: str = field(default="vector", metadata={"help": "Bias scale D: vector, constant or none."})
    e: str = field(default="vector", metadata={"help": "Bias shift E: vector, constant or none."})
    structure: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Choices by layer name (or pattern): 'lora,none,vector,none,none' for A, B, C, D, E."},
    )
    a_rate: float = field(
        default=1.0,
        metadata={"help": "Factor on the learning rate of A, whose step is as small as W; 10 is worth a try."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("form", FORMS)
        if self.dropout:
            raise ValueError(
                "dropout must be 0: GLoRA scales the weight itself, so there is no input of its own to drop."
            )
        if not self.a_rate > 0:
            raise ValueError(f"a_rate must be above 0, not {self.a_rate!r}.")
        for part, choices in CHOICES.items():
            self.check_choice(part, choices)
        for layer, text in self.structure.items():
            self.parse_structure(layer, text)

    def parse_structure(self, layer: str, text: str) -> dict[str, str]:
        """'lora,none,...' -> {"a": "lora", "b": "none", ...}.

        Raises:
            ValueError: naming the layer when the text is not a structure.
        """
        values = [value.strip() for value in text.split(",")]
        wrong = [v for v, known in zip(values, CHOICES.values(), strict=False) if v not in known]
        if len(values) != len(CHOICES) or wrong:
            raise ValueError(
                f"structure['{layer}'] must be five choices for A, B, C, D, E such as 'lora,none,vector,none,none', "
                f"not '{text}'."
            )
        return dict(zip(CHOICES, values, strict=True))

    def choices_for(self, layer: str) -> dict[str, str]:
        """The five choices of the layer of this name."""
        key = get_pattern_key(self.structure.keys(), layer)
        if key in self.structure:
            return self.parse_structure(key, self.structure[key])
        return {part: getattr(self, part) for part in CHOICES}


class GloraLayer(AdapterLayer, name="glora", config=GloraConfig, kind="RANKFOLD_GLORA"):
    """A linear layer or a convolution with GLoRA. What was chosen shows in the shapes: (out, 1) is a vector, (1, 1) a constant."""

    def init_tensors(self, config: GloraConfig, r: int) -> dict[str, torch.Tensor]:
        fan_in, fan_out = self.fan_in, self.fan_out
        shapes = {
            ("a", "lora"): {"a_up": (fan_in if config.form == "matmul" else fan_out, r), "a_down": (r, fan_in)},
            ("a", "vector"): {"a_up": (fan_out, 1)},
            ("a", "constant"): {"a_up": (1, 1)},
            ("b", "lora"): {"b_up": (fan_out, r), "b_down": (r, fan_in)},
            ("b", "vector"): {"b_up": (fan_out, 1)},
            ("b", "constant"): {"b_up": (1, 1)},
            ("c", "lora"): {"c_up": (fan_in, r), "c_down": (r, 1)},
            ("c", "vector"): {"c_up": (fan_in, 1)},
            ("d", "vector"): {"d": (fan_out,)},
            ("d", "constant"): {"d": (1,)},
            ("e", "vector"): {"e": (fan_out,)},
            ("e", "constant"): {"e": (1,)},
        }
        tensors: dict[str, torch.Tensor] = {}
        choices = config.choices_for(self.layer_name)
        if self.base_bias() is None:
            choices["d"] = "none"  # there is nothing to scale
        for choice in choices.items():
            for name, shape in shapes.get(choice, {}).items():
                tensors[name] = torch.zeros(shape)
                if name.endswith("down"):
                    nn.init.kaiming_uniform_(tensors[name], a=math.sqrt(5))
        return tensors

    def lr_multipliers(self, config: GloraConfig) -> dict[str, float]:
        return {"a_up": config.a_rate, "a_down": config.a_rate}

    def change(self, adapter: str, tensors: dict[str, torch.Tensor]) -> Change:
        get, form = tensors.get, self.settings[adapter].form
        parts: list[Change] = []
        a_up, a_down, b_up, b_down, c_up, c_down = (get(f"{p}_{side}") for p in "abc" for side in ("up", "down"))
        if a_up is not None and a_down is None:
            parts.append(Change(rows=a_up[:, 0].expand(self.fan_out)))
        elif a_up is not None and form == "matmul":
            parts.append(Change(up=self.base_weight_like(a_up) @ a_up, down=a_down))
        elif a_up is not None:
            parts.append(Change(mask_up=a_up, mask_down=a_down))
        if b_up is not None:
            ones = b_up.new_ones(1, self.fan_in)
            parts.append(Change(up=b_up.expand(self.fan_out, -1), down=ones if b_down is None else b_down))
        if c_up is not None:
            prompt = c_up[:, 0] if c_down is None else (c_up @ c_down)[:, 0]
            parts.append(Change(bias=self.base_weight_like(prompt) @ prompt))
        bias = self.base_bias()
        if "d" in tensors and bias is not None:
            parts.append(Change(bias=tensors["d"] * bias.to(tensors["d"].dtype)))
        if "e" in tensors:
            parts.append(Change(bias=tensors["e"].expand(self.fan_out)))
        return Change.sum(parts)

    def base_weight_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The frozen weight (out, in) in the tensor's dtype."""
        return self.base_weight().to(tensor.dtype)
