"""Memory by category, and the peak of a stretch of work from what the device itself counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from esm_efficient.errors import EsmEfficientError

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")
"""What memory is held for, in the order of tables and plots."""

PHASES = ("data", "forward", "backward", "optimizer", "evaluation")
"""The parts of training that costs are told apart by; ``data`` is the wait between steps."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are held for.

    Attributes:
        weights: parameters and buffers of the model, adapters included.
        gradients: of the parameters.
        optimizer: state of the optimizer.
        activations: what a forward pass computes, kept for the backward pass or about to be freed, and what the
            backward pass recomputes of it.
        other: the rest: gradients of activations, temporaries, inputs, workspaces.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in CATEGORIES)

    def to_dict(self) -> dict[str, int]:
        """The categories and their ``total``."""
        return {name: getattr(self, name) for name in CATEGORIES} | {"total": self.total}


@dataclass
class PeakMemory:
    """The peak of a stretch of work; filled in when the stretch ends.

    Attributes:
        bytes: the peak.
        kind: what was counted: tensors on a CUDA device, or all memory of the process on a CPU.
    """

    bytes: int = 0
    kind: str = ""


class OutOfMemoryError(EsmEfficientError, torch.OutOfMemoryError):
    """A device ran out of memory while it was profiled; the message says what was held and what would fit.

    It is torch's own error too, so that ``except torch.OutOfMemoryError`` catches it.

    Attributes:
        phase: of training: forward, backward, optimizer, evaluation or data.
        held: bytes by category at that moment.
    """

    def __init__(self, message: str, *, phase: str = "", held: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.phase = phase
        self.held = held or {}


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak memory of a ``with`` block.

    On CUDA it is the allocator's own peak of allocated bytes on the current device. Elsewhere it is the resident
    memory of the whole process, Python and libraries included: on Linux the peak within the block, on other systems
    the peak since the process started, and ``kind`` says which.

    Yields:
        A `PeakMemory` that holds its figures once the block has ended.

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
    """Start the kernel's count of the resident peak anew; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """The resident peak in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil  # accelerate needs it too

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
