"""Frozen blocks that wait in main memory and are copied to the device when they are at work (block swap).

The base is frozen, so copies go one way: a block that has done its work is dropped on the device, since main memory still holds it. While
one block works the next one is copied, on a stream of its own where the device has streams; so two are on the device at a time. Which one
is next is learned from the first pass. In the backward pass a block is asked for by the gradients of what it returned, with activation
checkpointing (which runs it again then) and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ...toolkit.adapters.attach import adapter_layers
from ...toolkit.core.devices import has_own_memory, torch_backend
from ...toolkit.core.errors import UserError
from ...toolkit.core.quantize import move_model
from ..config.subject import SubjectConfig

BLOCKS_AT_ONCE = 2  # on the device: the one at work and the next


def check_block_swap(config: SubjectConfig) -> None:
    """Raises UserError for settings that do not go with blocks that wait in main memory."""
    for flag, given in (("--compile", config.compile), ("--shard-base", config.shard_base)):
        if given:
            raise UserError(f"--blocks-to-swap does not go with {flag}: leave one of the two out.")


def check_count(wanted: int | str, blocks: int) -> None:
    """Raises UserError when so many of a base's blocks cannot be swapped, or nothing would come of it."""
    if blocks <= BLOCKS_AT_ONCE:
        raise UserError(f"--blocks-to-swap saves nothing on this base, which has {blocks} blocks: leave it out.")
    if isinstance(wanted, int) and not BLOCKS_AT_ONCE < wanted <= blocks:
        reason = "two are on the device at a time" if wanted <= BLOCKS_AT_ONCE else f"this base has {blocks}"
        raise UserError(
            f"--blocks-to-swap {wanted}: {reason}, so take {BLOCKS_AT_ONCE + 1} to {blocks}, or all; 0 swaps none."
        )


def swapped_numbers(wanted: int | str, blocks: int) -> list[int]:
    """Which of a model's blocks wait in main memory: as many as wanted, spread evenly, so that each has most time to come."""
    count = blocks if wanted == "all" else int(wanted)
    return [number * blocks // count for number in range(count)]


def swappable_weights(block: nn.Module) -> list[nn.Parameter]:
    """A block's frozen matrices, in any dtype and quantised or not. What is small stays on the device, and so do adapters."""
    layers = adapter_layers(block).values()
    adapters = {id(p) for own in layers for name, p in own.named_parameters() if not name.startswith("base_layer.")}
    return [p for p in block.parameters() if not p.requires_grad and p.dim() > 1 and id(p) not in adapters]


class WaitingTensor:
    """What a frozen tensor holds, in main memory and, while it is at work, on the device."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """tensors: all that share one storage; whoever refers to them sees the change of place."""
        data = tensors[0].data
        self.tensors = tensors
        self.on_host = data
        if has_own_memory(device.type):
            self.on_host = torch.empty_like(data, device="cpu", pin_memory=True).copy_(data)
        self.on_device = torch.empty_like(data, device=device)
        self.bytes = self.on_device.untyped_storage().nbytes()
        self.drop()

    def copy(self) -> None:
        """To the device; what autograd keeps of the device's tensor, views too, holds the numbers again."""
        self.on_device.untyped_storage().resize_(self.bytes)
        self.on_device.copy_(self.on_host, non_blocking=True)
        self.point_to(self.on_device)

    def drop(self) -> None:
        """Off the device."""
        self.point_to(self.on_host)
        self.on_device.untyped_storage().resize_(0)

    def point_to(self, data: torch.Tensor) -> None:
        """Gives the tensors another place; data: as they are, of any shape (...)."""
        for tensor in self.tensors:
            tensor.data = data


class SwappedBlock:
    """A block whose matrices wait in main memory."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        """The block is on the device whole while this is done."""
        move_model(block, device)
        self.module = block
        self.loaded = False
        self.copied: Any = None
        """The event behind the copies, where the device has streams."""
        sharing: dict[int, list[torch.Tensor]] = {}
        for tensor in [own for weight in swappable_weights(block) for own in plain_tensors(weight)]:
            sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.tensors = [WaitingTensor(tensors, device) for tensors in sharing.values()]


def plain_tensors(weight: Any) -> list[torch.Tensor]:
    """The tensors that a weight consists of: its codes and scales (torchao), its codes and a second name for them (bitsandbytes, 8 bit)."""
    if is_traceable_wrapper_subclass(weight):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight, *([weight.CB] if getattr(weight, "CB", None) is not None else [])]


class BlockSwap:
    """The order in which a model's swapped blocks come to the device and leave it."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        backend = torch_backend(device.type) if has_own_memory(device.type) else None
        self.backend, self.stream = backend, backend.Stream(device) if backend else None
        self.blocks = [SwappedBlock(block, device) for block in blocks]
        self.current: tuple[SwappedBlock, str] | None = None
        """The block at work, and the kind of pass."""
        self.next: dict[tuple[SwappedBlock, str], SwappedBlock] = {}
        """Which block came after it the last time."""
        self.copies = 0
        """Blocks that have been copied to the device."""
        for own in self.blocks:
            own.module.register_forward_pre_hook(lambda _, __, own=own: self.before_forward(own))
            own.module.register_forward_hook(lambda _, __, output, own=own: self.after_forward(own, output))

    def before_forward(self, block: SwappedBlock) -> None:
        """Brings the block, unless a backward pass has brought it already and only runs it again."""
        self.use(block, "forward" if torch.is_grad_enabled() else "without gradients")

    def after_forward(self, block: SwappedBlock, output: Any) -> None:
        """Has the block brought back when the gradient of anything that it returned is known."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.use(block, "backward"))

    def use(self, block: SwappedBlock, kind: str) -> None:
        """Has the block on the device, and the one that is likely to follow on its way there; no other stays."""
        if self.current is not None:
            if self.current[0] is block:
                return
            self.next[self.current] = block
        self.current = (block, kind)
        self.drop(keep=block)
        self.load(block)
        if self.stream is not None:
            self.backend.current_stream(self.device).wait_event(block.copied)
        if (upcoming := self.next.get(self.current)) is not None:
            self.load(upcoming)

    def load(self, block: SwappedBlock) -> None:
        """Begins to copy a block, unless it is there."""
        if block.loaded:
            return
        with nullcontext() if self.stream is None else self.backend.stream(self.stream), torch.no_grad():
            for tensor in block.tensors:
                tensor.copy()
        if self.stream is not None:
            block.copied = self.stream.record_event()
        block.loaded = True
        self.copies += 1

    def drop(self, keep: SwappedBlock | None = None) -> None:
        """Takes blocks off the device. Their memory is given to no later copy before the work on them that is under way has ended."""
        if self.stream is not None:
            self.stream.wait_stream(self.backend.current_stream(self.device))
        for block in self.blocks:
            if block.loaded and block is not keep:
                for tensor in block.tensors:
                    tensor.drop()
                block.loaded = False

    def release(self) -> None:
        """Takes all blocks off the device: what is read or changed of their weights then is what main memory holds."""
        if self.stream is not None:
            self.stream.synchronize()  # no copy is under way when main memory changes
        self.drop()
        self.current = None


def swap_blocks(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Brings a model to the device but for these of its blocks, whose matrices wait in main memory from now on."""
    model.block_swap = BlockSwap(blocks, device)  # type: ignore[assignment]
    move_others(model, set(blocks), device)


def move_others(module: nn.Module, blocks: set[nn.Module], device: torch.device) -> None:
    """Brings everything to the device that lies in none of the blocks."""
    inside = [child for child in module.children() if child not in blocks]
    for child in inside:
        if blocks.isdisjoint(child.modules()):
            move_model(child, device)
        else:
            move_others(child, blocks, device)
    module._apply(lambda tensor: tensor.to(device), recurse=False)


def find_block_swap(module: nn.Module) -> BlockSwap | None:
    """The block swap of a model, or of one that it holds."""
    return next((found for own in module.modules() if (found := getattr(own, "block_swap", None)) is not None), None)


def release_blocks(model: nn.Module) -> None:
    """See `BlockSwap.release`; nothing for other models."""
    if (swap := find_block_swap(model)) is not None:
        swap.release()


@contextmanager
def on_device(swap: BlockSwap, block: SwappedBlock) -> Iterator[nn.Module]:
    """A block with its weights on the device, where its adapters are."""
    swap.release()
    swap.use(block, "read")
    try:
        yield block.module
    finally:
        swap.release()


def ignore_waiting_in_ddp(module: nn.Module) -> None:
    """Tells DDP to look after trained parameters only."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
