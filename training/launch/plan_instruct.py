"""What a run of visual instruction tuning will take, before any weight is loaded: its data, its steps, and the memory that is sure.

The model is built without numbers (torch's meta device) and the adapter put on it as in training, so what is counted is the real
architecture. Activations hang on the attention kernels and are not estimated: they come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...toolkit.core.quantize import block_linears
from ...toolkit.diffusion.model import DTYPES
from ..config.checks import check_ranges
from ..config.defaults import resolve_defaults
from ..config.instruct import InstructConfig
from ..instruct.adapter import InstructAdapter
from ..instruct.prepare import PreparedData, open_without_weights, prepare_instruct, rows_per_epoch
from .plan import BYTES_PER_WEIGHT, OPTIMIZER_STATES
from .start import check_settings


@dataclass(frozen=True)
class InstructPlan:
    """What is sure of a run."""

    config: InstructConfig
    """With its number of steps."""
    data: PreparedData
    base: int
    """Bytes of the frozen model."""
    parameters: int
    """That are trained."""
    logits: int
    """Bytes of the logits of the largest batch, with their gradient."""
    layers: list[str]
    """What is trained, in lines."""

    @property
    def trained(self) -> int:
        """Bytes of what is trained, with its gradient and the optimizer's states, in fp32."""
        states = OPTIMIZER_STATES.get(self.config.optimizer, 2)
        return int(4 * self.parameters * (2 + states))

    def summary(self) -> list[str]:
        """The plan for people."""
        config, rows = self.config, rows_per_epoch(self.config, self.data)
        window = config.batch_size * config.gradient_accumulation
        gib = lambda size: f"{size / 2**30:8.2f} GiB"  # noqa: E731
        return [
            *self.layers,
            f"steps            {config.steps:,} of {window} rows: {config.steps * window / rows:.2f} passes over {rows:,} rows",
            f"base             {gib(self.base)}",
            f"adapter, states  {gib(self.trained)} ({self.parameters:,} parameters; its file {self.parameters * 4 / 2**20:.1f} MiB)",
            f"logits           {gib(self.logits)} at most",
            f"sure             {gib(self.base + self.trained + self.logits)}, and activations on top"
            + (" (one block's, with --gradient-checkpointing)" if config.gradient_checkpointing else ""),
        ]


def plan_instruct(config: InstructConfig) -> InstructPlan:
    """Checks everything that `train` checks before a model is loaded, and counts.

    Raises:
        UserError: as `train` does.
    """
    check_ranges(config)
    config = resolve_defaults(config)
    check_settings(config)
    config, (data, folder) = prepare_instruct(config)
    vision = open_without_weights(config, folder)
    model: Any = vision.model
    base = frozen_bytes(model, config)
    adapter = InstructAdapter(config)
    adapter.attach(vision)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    most = sum(
        sorted((count for group in data.groups for count in group.num_learned), reverse=True)[: config.batch_size]
    )
    words = model.get_output_embeddings().weight.shape[0]
    return InstructPlan(config, data, base, parameters, 2 * 4 * most * words, adapter.describe(vision))


def frozen_bytes(model: Any, config: InstructConfig) -> int:
    """Bytes of the frozen weights in their dtype, or quantized."""
    whole = sum(parameter.numel() for parameter in model.parameters()) * DTYPES[config.precision].itemsize
    if config.quantize == "none":
        return whole
    blocks = sum(layer.weight.numel() for layer in block_linears(model).values())
    return int(whole - blocks * (DTYPES[config.precision].itemsize - BYTES_PER_WEIGHT[config.quantize]))
