"""Count every storage that torch's operations allocate, from the operation to the last reference.

The counter is used twice. Under fake tensors it predicts the memory of a step that is not computed. On a CPU, where
torch keeps no such count, it measures a real step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient._torch import TorchDispatchMode, storage_key, with_flex_attention
from esm_efficient.costs.memory import CATEGORIES, Memory

Observer = Callable[[Any, tuple, dict, Any], None]


@with_flex_attention
class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of live storages by category while it is entered.

    An allocation counts under `category`, which the caller sets when the phase of training changes. Activations are
    what the forward pass computes, and what the backward pass recomputes of it. Weights, gradients and optimizer state
    are moved to their own categories by `hold`. The categories are those of torch's ``MemTracker``
    (torch.distributed._tools), which counts per module.

    Memory that a kernel allocates without a tensor is not counted.

    Args:
        granularity: sizes are rounded up to a multiple of this many bytes, such as 512 for torch's CUDA allocator.
        observer: called after every operation with the operation, its arguments and its result.

    Attributes:
        held: bytes of live storages now, by category.
        category: the category of new allocations.
        recomputes: count allocations as activations while gradients are enabled, whatever `category` is.

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
        """Bytes by category at the moment of the highest total since `reset_peak`."""
        return Memory(**self._peak)

    def reset_peak(self) -> None:
        """Start a new peak from the bytes that are live now."""
        self._peak_total, self._peak = self._total, dict(self.held)

    def hold(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Count tensors under a category from now on, whether they were counted before or not."""
        for tensor in tensors:
            if tensor is None:
                continue
            allocation = self._live.get(storage_key(tensor.untyped_storage()))
            if allocation is None:
                self._add(tensor, category)
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
        for tensor in tensors_in(result):
            self._add(tensor, category)
        if self.observer is not None:
            self.observer(func, args, kwargs, result)
        return result

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        if key in self._live or size == 0:
            return
        size = -(-size // self.granularity) * self.granularity
        # The Python object of a storage lives as long as the storage, so the weak reference shows when it is freed.
        self._live[key] = _Allocation(size, category, weakref.ref(storage, lambda _: self._free(key)))
        self.held[category] += size
        self._total += size
        if self._total >= self._peak_total:
            self._peak_total, self._peak = self._total, dict(self.held)

    def _free(self, key: int) -> None:
        allocation = self._live.pop(key)
        self.held[allocation.category] -= allocation.bytes
        self._total -= allocation.bytes


@dataclass(slots=True)
class _Allocation:
    bytes: int
    category: str
    reference: weakref.ref


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, also those in tuples, lists and dicts at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def storage_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Return the bytes of the tensors' storages on a device; a storage that several tensors share counts once."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None and tensor.device == device:
            storage = tensor.untyped_storage()
            sizes[storage_key(storage)] = storage.nbytes()
    return sum(sizes.values())


def model_tensors(model: nn.Module) -> Iterable[Tensor]:
    """Yield the parameters and buffers of a model."""
    yield from model.parameters()
    yield from model.buffers()
