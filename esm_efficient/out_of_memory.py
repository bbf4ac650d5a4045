"""The error of a device that runs out of memory. It derives from torch's class, so it is not in `errors`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from esm_efficient.errors import EsmEfficientError


class OutOfMemoryError(EsmEfficientError, torch.OutOfMemoryError):
    """A device ran out of memory; the message says what would fit, and in a profiled run what filled the memory.

    The class is a subclass of torch's error, so that ``except torch.OutOfMemoryError`` catches it.

    Attributes:
        phase: ``"training"`` or ``"evaluation"``, in a profiled run the phase of a step; empty in a prediction.
        held: bytes by category at that moment, and their ``total``; empty without a profile.
    """

    def __init__(self, message: str, *, phase: str = "", held: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.phase = phase
        self.held = held or {}


@contextmanager
def explained_batch(shape: Sequence[int], *, several: str, single: str) -> Iterator[None]:
    """Say what to do if the device runs out of memory in a batch that is not trained on.

    Args:
        shape: sequences and tokens of the batch.
        several: advice if the batch has several sequences.
        single: advice if it has one.

    Raises:
        OutOfMemoryError: the device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the device ran out of memory with a batch of {shape[0]} sequence(s) of up to {shape[1]:,} tokens. "
            + (several if shape[0] > 1 else f"That is one sequence: {single}")
        ) from error
