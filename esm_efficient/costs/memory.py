"""Memory by category, the phases of training, and the peak memory of a block of code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")
"""What memory is used for, in the order of tables and plots."""

Phase = Literal["data", "forward", "backward", "optimizer", "evaluation"]
"""A phase of training; ``data`` is the wait for a batch."""

PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases, in the order of tables and plots."""


@dataclass(frozen=True)
class Memory:
    """Bytes by category.

    Attributes:
        weights: parameters and buffers of the model, adapters included.
        gradients: gradients of the parameters.
        optimizer: state of the optimizer.
        activations: results of the forward pass, whether kept for the backward pass or soon freed, and what the
            backward pass recomputes of them.
        other: everything else: gradients of activations, temporaries, inputs, workspaces.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Sum of the categories."""
        return sum(getattr(self, name) for name in CATEGORIES)

    def to_dict(self) -> dict[str, int]:
        """Return the categories and their ``total``."""
        return {name: getattr(self, name) for name in CATEGORIES} | {"total": self.total}


@dataclass
class PeakMemory:
    """Peak memory of a block of code; it is filled in when the block ends.

    Attributes:
        bytes: the peak in bytes.
        kind: what was counted: tensors on a CUDA device, or all memory of the process on a CPU.
    """

    bytes: int = 0
    kind: str = ""


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak memory of a ``with`` block.

    On CUDA the peak is that of the bytes that torch's allocator handed out on the current device, also if the block
    computes on the CPU. Elsewhere it is the resident memory of the whole process, with Python and libraries: on Linux
    the peak within the block, on other systems the peak since the process started. ``kind`` says which. A process
    keeps some of the memory that it frees, and a block that uses this memory again does not raise the peak. The block
    resets the counter of torch or of Linux, so do not nest two blocks.

    Yields:
        A `PeakMemory`; its figures are set when the block ends.

    Example:
        >>> with peak_memory() as peak:
        ...     _ = torch.zeros(1000)
        >>> peak.bytes > 0
        True
    """
    peak = PeakMemory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        try:
            yield peak
        finally:
            peak.bytes, peak.kind = torch.cuda.max_memory_allocated(), "CUDA tensors"
        return
    within = restart_resident_peak()
    try:
        yield peak
    finally:
        peak.bytes = resident_peak()
        peak.kind = "process" if within else "process since it started"


def restart_resident_peak() -> bool:
    """Reset the kernel's peak of resident memory; return False on systems that cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """Return the peak resident memory of the process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil  # accelerate requires it, so it is installed

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def driver_bytes(device: torch.device) -> tuple[int | None, str]:
    """Return the bytes that all processes use on a device, and the source of the figure; None on a CPU."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), "Metal, this process"
    if device.type != "cuda":
        return None, ""
    try:
        return torch.cuda.device_memory_used(device), "NVML"
    except Exception as error:  # NVML can be missing or fail in many ways, and none of them may end a training
        free, total = torch.cuda.mem_get_info(device)
        return total - free, f"CUDA driver; NVML failed: {error}"
