"""Time of the phases of training, by the clock of the device."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from esm_efficient.costs.throughput import synchronize


class PhaseClock:
    """Sums the time of phases that follow one another.

    On CUDA a phase ends with an event on the current stream, and the host does not wait for it. Elsewhere the host
    waits for the device and reads its own clock.

    Example:
        >>> clock = PhaseClock(torch.device("cpu"))
        >>> clock.lap("forward")
        >>> list(clock.seconds())
        ['forward']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = {}
        self._began: Any = None
        self.restart()

    def restart(self) -> None:
        """Forget all phases and begin a new one."""
        synchronize(self._device)
        self._pending.clear()
        self._seconds.clear()
        self._began = self._now()

    def lap(self, phase: str) -> None:
        """End the current phase, which has this name, and begin the next."""
        now = self._now()
        self._pending.append((phase, self._began, now))
        self._began = now

    def seconds(self, *, wait: bool = True) -> dict[str, float]:
        """Return the seconds of each phase.

        Args:
            wait: wait for phases that the device has not finished yet; otherwise they are left out.
        """
        while self._pending:
            phase, began, ended = self._pending[0]
            if isinstance(ended, float):
                elapsed = ended - began
            elif wait or ended.query():
                ended.synchronize()
                elapsed = began.elapsed_time(ended) / 1000
            else:
                break
            self._pending.popleft()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed
        return dict(self._seconds)

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronize(self._device)
        return time.perf_counter()
