"""How the work of a layer is divided on a device.

A kernel's launch costs a GPU as much as its work on a small batch, and a CPU next to nothing. A CPU therefore computes
the MLP in chunks, to save memory, and a GPU computes it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from esm_efficient.encoder.elementwise import EAGER, Elementwise

MIN_CHUNK_TOKENS = 512
"""Tokens per chunk of the MLP, at least; the last chunk may have fewer."""
MAX_CHUNKS = 8
"""The largest number of chunks on a CPU."""
GPU_CHUNK_BYTES = 256 * 1024**2
"""Bytes of the MLP's inner states per chunk on a GPU, so that they never determine the peak of memory.

A kernel that reads or writes so much takes many times as long as its launch, so more chunks cost no time.
"""


@dataclass(frozen=True)
class Plan:
    """How a layer computes on a kind of device.

    Attributes:
        kind: torch's name of the kind, such as ``"cuda"``.
        fused: whether torch.compile fuses the elementwise functions.
    """

    kind: str
    fused: bool = False

    @property
    def elementwise(self) -> Elementwise:
        """The elementwise functions of a layer."""
        if not self.fused:
            return EAGER
        from esm_efficient.encoder.fusion import FUSED  # registers operations

        return FUSED

    @property
    def apart(self) -> bool:
        """Whether queries, keys and values are tensors of their own, as a GPU's attention kernels write gradients.

        Elsewhere one matrix product computes all three.
        """
        return self.kind == "cuda"

    def chunks(self, tokens: int, token_bytes: int) -> list[slice]:
        """Divide a batch into chunks of the MLP, whose inner states then need memory for one chunk at a time.

        Args:
            tokens: tokens of the batch.
            token_bytes: bytes of a token's inner states.

        Example:
            >>> Plan("cpu").chunks(1200, 10240)
            [slice(0, 512, None), slice(512, 1024, None), slice(1024, 1536, None)]
            >>> Plan("cuda").chunks(1200, 10240)
            [slice(0, 26214, None)]
        """
        size = GPU_CHUNK_BYTES // token_bytes if self.kind == "cuda" else -(-tokens // MAX_CHUNKS)
        size = max(MIN_CHUNK_TOKENS, size)
        return [slice(start, start + size) for start in range(0, tokens, size)]


class _Device(threading.local):
    """The kind of device that a thread plans for; None for the kind that has the tensors."""

    kind: str | None = None


_device = _Device()


def plan_for(kind: str, *, fused: bool = False) -> Plan:
    """Return the plan for tensors on a kind of device, or for the device that `plan_as` names."""
    return Plan(_device.kind or kind, fused)


@contextmanager
def plan_as(kind: str | None) -> Iterator[None]:
    """Divide the work as another kind of device does, for forward passes of this thread and their backward passes.

    Args:
        kind: torch's name of the kind; None for the kind that has the tensors.
    """
    previous, _device.kind = _device.kind, kind
    try:
        yield
    finally:
        _device.kind = previous


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of matrix products under torch.autocast on a kind of device; None without autocast."""
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def autocast_as(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Make `autocast_dtype` what it was in a forward pass; None turns autocast off."""
    if autocast_dtype(kind) == dtype:
        return nullcontext()
    return torch.autocast(kind, dtype, enabled=dtype is not None)
