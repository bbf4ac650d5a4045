"""Every storage that torch's operations allocate, counted from the operation to the last reference.

One counter serves two ends: under fake tensors it predicts a step without computing it, and on a CPU, which keeps no
such count itself, it measures a real one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esm_efficient.costs.memory import CATEGORIES, Memory

Observer = Callable[[Any, tuple, dict, Any], None]


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of live storages by category while it is entered.

    What an operation allocates is put under `category`, which whoever knows the phase of training sets; activations
    are what the forward pass computes, its recomputation in the backward pass included. Weights, and gradients and
    optimizer state once they are there, are moved to their own category by `hold`. The words are those of torch's
    ``MemTracker`` (torch.distributed._tools), which counts per module.

    Memory that a kernel takes for itself, without a tensor, is not seen.

    Args:
        granularity: bytes that the size of an allocation is rounded up to, such as 512 for torch's CUDA allocator.
        observer: called after every operation with the operation, its arguments and its result.

    Attributes:
        held: bytes now, by category.
        category: what new allocations count as.
        recomputes: whether allocations count as activations while gradients are enabled, whatever the category.

    Example:
        >>> with AllocationTracker() as tracker:
        ...     kept = torch.zeros(10) + 1
        >>> tracker.current.total, tracker.peak.total
        (40, 80)
    """

    def __init__(self, *, granularity: int = 1, observer: Observer | None = None) -> None:
        super().__init__()
        self.granularity = granularity
        self.observer = observer
        self.held = dict.fromkeys(CATEGORIES, 0)
        self.category = "other"
        self.recomputes = False
        self._total = 0
        self._peak_total = 0
        self._peak = dict(self.held)
        self._live: dict[int, _Allocation] = {}

    @property
    def current(self) -> Memory:
        """Bytes of live storages now."""
        return Memory(**self.held)

    @property
    def peak(self) -> Memory:
        """Bytes at the moment of the highest total since `reset_peak`."""
        return Memory(**self._peak)

    def reset_peak(self) -> None:
        """Start looking for a new peak from what is held now."""
        self._peak_total, self._peak = self._total, dict(self.held)

    def hold(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Count tensors under a category from now on, whether they were seen before or not."""
        for tensor in tensors:
            if tensor is None:
                continue
            allocation = self._live.get(tensor.untyped_storage()._cdata)
            if allocation is None:
                self._see(tensor, category)
            elif allocation.category != category:
                self.held[allocation.category] -= allocation.bytes
                self.held[category] += allocation.bytes
                allocation.category = category
                if self._total >= self._peak_total:
                    self._peak = dict(self.held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it allocated."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        category = "activations" if self.recomputes and torch.is_grad_enabled() else self.category
        if isinstance(result, Tensor):
            self._see(result, category)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item, category)
        if self.observer is not None:
            self.observer(func, args, kwargs, result)
        return result

    def _see(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        if size == 0:
            return
        size = -(-size // self.granularity) * self.granularity
        # torch keeps a storage's Python object for as long as the storage lives, so its end is the storage's.
        self._live[key] = _Allocation(size, category, weakref.ref(storage, lambda _: self._free(key)))
        self.held[category] += size
        self._total += size
        if self._total >= self._peak_total:
            self._peak_total, self._peak = self._total, dict(self.held)

    def _free(self, key: int) -> None:
        allocation = self._live.pop(key)
        self.held[allocation.category] -= allocation.bytes
        self._total -= allocation.bytes


class _Allocation:
    __slots__ = ("bytes", "category", "reference")

    def __init__(self, size: int, category: str, reference: weakref.ref) -> None:
        self.bytes = size
        self.category = category
        self.reference = reference
