"""What is counted while a step is carried out on tensors that have shapes and no numbers (torch's FakeTensorMode)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes that are alive among the tensors made within it, and operations.

    torch's own FlopCounterMode hangs hooks on modules that keep alive what gradient checkpointing lets go.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        """before: tensors that were there already, whose views are not counted."""
        super().__init__()
        self.current = self.peak = self.flops = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (kind := getattr(func, "overloadpacket", None)) in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        """Adds a storage that was not seen before, until it dies."""
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.current -= size


class RealTensorMode(TorchDispatchMode):
    """Carries out for real what hangs on real tensors alone: what prompts' ids and masks say is known, and some models go by it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in nonzero_indices(index)])
        if any(is_fake(value) for value in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


def is_fake(value: Any) -> bool:
    """Whether this is a tensor without numbers."""
    return isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or value.is_meta)


def nonzero_indices(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """A real mask, of any shape, as the numbers of the places it keeps, of which a fake tensor does not know how many there are."""
    if index is None or is_fake(index) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)
