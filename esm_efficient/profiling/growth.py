"""Find memory that every training step leaves behind."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.reporting import format_bytes

logger = logging.getLogger(__name__)

_WINDOW = 16
"""Number of steps that are searched for growth."""

_LIKELY_CAUSES = {
    "activations": "outputs of the forward pass stay alive: is a loss, a logit or a hidden state kept in a "
    "list without detach()?",
    "gradients": "gradients pile up: does every step create new parameters?",
    "optimizer": "the state of the optimizer grows: does every step add parameters to it?",
    "weights": "the model grows.",
    "other": "tensors from outside the forward pass stay alive: are batches or gradients kept in a list?",
}


@dataclass(frozen=True)
class Growth:
    """Memory that each step leaves behind.

    Attributes:
        bytes_per_step: bytes by which the memory in use at the end of a step grows from step to step.
        category: the category that grows most.
        steps: number of steps in which the growth was seen.
    """

    bytes_per_step: float
    category: str
    steps: int

    def __str__(self) -> str:
        return (
            f"memory in use at the end of a step grows by {format_bytes(round(self.bytes_per_step))} per step "
            f"({self.category}, over {self.steps} steps): {_LIKELY_CAUSES[self.category]}"
        )


def find_growth(ends: Sequence[Memory], *, noise: int = 256 * 1024) -> Growth | None:
    """Find memory that is kept from step to step.

    Each step end of the later half must have more memory than every step end of the earlier half. Memory that is kept
    adds up, while the memory of long and short batches goes up and down.

    Args:
        ends: memory at the ends of steps, in order.
        noise: bytes by which the halves must differ at least.

    Returns:
        The growth between the medians of the halves, or None; None for fewer than 6 steps.

    Example:
        >>> find_growth([Memory(activations=i * 2**20) for i in range(6)]).bytes_per_step / 2**20
        1.0
    """
    half = len(ends) // 2
    if half < 3:
        return None
    early, late = ends[:half], ends[-half:]
    if min(memory.total for memory in late) <= max(memory.total for memory in early) + noise:
        return None
    between = len(ends) - half  # number of steps from the middle of one half to the middle of the other
    grown = {
        name: statistics.median(getattr(m, name) for m in late) - statistics.median(getattr(m, name) for m in early)
        for name in CATEGORIES
    }
    return Growth(sum(grown.values()) / between, max(grown, key=lambda name: grown[name]), len(ends))


class GrowthWatch:
    """Looks for growth in the latest steps of a run.

    Attributes:
        growth: the latest finding, or None; the first finding is logged as a warning.
    """

    def __init__(self) -> None:
        self.growth: Growth | None = None
        self._ends: deque[Memory] = deque(maxlen=_WINDOW)

    def add(self, held: Memory) -> None:
        """Add the memory at the end of a step."""
        self._ends.append(held)
        growth = find_growth(list(self._ends))
        if growth is not None and self.growth is None:
            logger.warning("%s", growth)
        self.growth = growth or self.growth

    def restart(self) -> None:
        """Forget the steps so far."""
        self._ends.clear()
