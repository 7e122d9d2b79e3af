"""A frozen base sharded over the devices: each keeps a share of every block and gathers the rest while the block is at work.

torch's FSDP2 (fully_shard) on the blocks that repeat, with the adapter's parameters left out of it: the adapter stays whole on every
device and is averaged as always (DDP), so that optimizer, checkpoints and files know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...toolkit.adapters.attach import adapter_layers, trainable_parameters
from ...toolkit.core.errors import UserError
from ..config.instruct import InstructConfig
from ..config.subject import SubjectConfig
from .block_swap import find_block_swap, on_device


def check_sharding(config: SubjectConfig | InstructConfig, processes: int) -> None:
    """Raises UserError when the base shall be sharded and cannot be."""
    if not config.shard_base:
        return
    if processes == 1:
        raise UserError(
            "--shard-base shards the base over several devices, but this is one process: start it with `accelerate launch "
            "--multi_gpu`, or leave it out."
        )
    others = {
        "--quantize": config.quantize != "none",
        "--prior-weight": isinstance(config, SubjectConfig) and config.prior_weight > 0,
        "--training-adapter": isinstance(config, SubjectConfig) and config.training_adapter is not None,
        "--compile": isinstance(config, InstructConfig) and config.compile,
    }
    for flag, wanted in others.items():
        if wanted:
            raise UserError(f"--shard-base does not go with {flag} yet: leave one of them out.")


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shares out the frozen parameters of the blocks, one block after another; a block is on the device whole while it is cut.

    Every process has to run the blocks equally often. The model is cut last, though nothing is left of it to cut: the root of a model
    is what keeps its parameters whole after a forward pass, and what lets the blocks below it be gathered ahead of their turn.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=set(trainable_parameters(block)))
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))
    model.to(device)


def ignore_shards_in_ddp(module: nn.Module) -> None:
    """Tells DDP to look after whole parameters only."""
    shares = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, shares)


def gathered_units(model: nn.Module) -> Iterator[nn.Module]:
    """A model in parts whose weights can be read: each block that is sharded or swapped with its weights in place, then what lies in none.

    All processes have to walk it.
    """
    swap = find_block_swap(model)
    shards = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    blocks = [own.module for own in swap.blocks] if swap else shards
    for number, block in enumerate(blocks):
        with on_device(swap, swap.blocks[number]) if swap else gather_weights(block):
            yield block
    if not blocks:
        yield model
        return
    inside = {layer for block in blocks for layer in adapter_layers(block).values()}
    yield nn.ModuleList(layer for layer in adapter_layers(model).values() if layer not in inside)


@contextmanager
def gather_weights(block: Any) -> Iterator[None]:
    """A sharded block with its whole weights in place."""
    block.unshard()
    try:
        yield
    finally:
        block.reshard()
