"""What a device says of its memory, behind one interface: the allocator's counters, or our own count on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from esm_efficient.costs.allocations import AllocationTracker
from esm_efficient.costs.memory import Memory


class Counter(Protocol):
    """Bytes of tensors on a device."""

    counted: str
    """What the counter counts, for the report."""

    def current(self) -> int:
        """Bytes held now."""
        ...

    def take_peak(self) -> tuple[int, int]:
        """The peaks of held and of reserved bytes since the last call."""
        ...


class CudaCounter:
    """The counters of torch's CUDA allocator. Taking a peak resets the allocator's own."""

    counted = (
        "bytes that torch's CUDA allocator had handed out; activations are, in a forward pass, all beyond weights, "
        "gradients and optimizer state, and in a backward pass what was held of it when the highest layer began"
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def current(self) -> int:
        """Bytes allocated now."""
        return torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]["current"]

    def take_peak(self) -> tuple[int, int]:
        """Peaks of allocated and reserved bytes."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]


class MpsCounter:
    """What torch says of Apple's GPUs: bytes now, and no peak."""

    counted = (
        "bytes that torch holds on the GPU, looked at when a phase or a layer begins or ends: MPS keeps no peak, so "
        "one in between is missed"
    )

    def __init__(self) -> None:
        self._peak = (0, 0)

    def current(self) -> int:
        """Bytes held now."""
        now = torch.mps.current_allocated_memory()
        self._peak = (max(self._peak[0], now), max(self._peak[1], torch.mps.driver_allocated_memory()))
        return now

    def take_peak(self) -> tuple[int, int]:
        """The highest figures that were looked at."""
        self.current()
        peak, self._peak = self._peak, (0, 0)
        return peak


class CpuCounter:
    """Exact bytes of live tensors, counted operation by operation, by category."""

    counted = "bytes of live CPU tensors, counted at every operation; what kernels take for themselves is not seen"

    def __init__(self, tracker: AllocationTracker) -> None:
        self.tracker = tracker

    def current(self) -> int:
        """Bytes held now."""
        return self.tracker.current.total

    def take_peak(self) -> tuple[int, int]:
        """The peak of live tensors; a CPU reserves nothing."""
        peak = self.tracker.peak.total
        self.tracker.reset_peak()
        return peak, 0


def split(peak: int, held: int, *, weights: int, gradients: int, optimizer: int, before: int = 0) -> Memory:
    """Split a peak of which only the sum is known.

    Args:
        peak: bytes at the highest moment.
        held: bytes that were held when what led to the peak began.
        weights: bytes of parameters and buffers.
        gradients: bytes of gradients when what led to the peak began.
        optimizer: bytes of optimizer state.
        before: bytes of other things that were there before training began.

    Returns:
        Categories that sum to `peak`: activations are what was held beyond the known ones, other is the rest.

    Example:
        >>> split(100, 90, weights=20, gradients=5, optimizer=10)
        Memory(weights=20, gradients=5, optimizer=10, activations=55, other=10)
    """
    rest = peak
    rest -= (weights_part := min(weights, rest))
    rest -= (gradients_part := min(gradients, rest))
    rest -= (optimizer_part := min(optimizer, rest))
    activations = min(max(held - weights - gradients - optimizer - before, 0), max(rest - before, 0))
    return Memory(weights_part, gradients_part, optimizer_part, activations, rest - activations)


def storage_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Bytes of the storages on a device that tensors lie in, each counted once."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None and tensor.device == device:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def model_tensors(model: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def driver_bytes(device: torch.device) -> tuple[int | None, str]:
    """Memory in use on the device by every process, and who says so."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), "Metal, this process"
    if device.type != "cuda":
        return None, ""
    try:
        return torch.cuda.device_memory_used(device), "NVML"
    except Exception as error:  # NVML may be missing, or refuse, in many ways, and none of them may end a training
        free, total = torch.cuda.mem_get_info(device)
        return total - free, f"CUDA driver; NVML gave none: {error}"
