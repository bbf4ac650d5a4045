"""Count what a training loop processes: sequences, residues, tokens and FLOPs per second."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from esm_efficient.costs.throughput import TokenCounter, WorkCounter, flops_per_token, matmul_rate
from esm_efficient.profiling.phases import PhaseTracker
from esm_efficient.tasks import SPECIAL_TOKENS

logger = logging.getLogger(__name__)


class ThroughputMeter:
    """Counts tokens all the time, and FLOPs until `end_warmup` only, because counting them is slow.

    Attributes:
        batch: sequences and tokens per sequence of the latest micro-batch, or None.
        dtype: the dtype of most FLOPs; None until they have been counted.
    """

    def __init__(self, phases: PhaseTracker, *, count_flops: bool) -> None:
        self.batch: tuple[int, int] | None = None
        self.dtype: torch.dtype | None = None
        self._tokens = TokenCounter()
        self._flops_of_batches: list[tuple[int, int, float]] = []
        self._matmul_rate = math.nan
        self._counter = WorkCounter(lambda: phases.stage) if count_flops else None
        if self._counter is not None:
            self._counter.__enter__()

    def begin_batch(self, inputs: Mapping[str, Any]) -> None:
        """Count a micro-batch."""
        self.end_batch()
        self.batch = self._tokens.add(inputs)

    def end_batch(self) -> None:
        """Note the FLOPs of the micro-batch that has ended."""
        if self._counter is not None:
            if self.batch is not None and self._counter.flops:
                self._flops_of_batches.append((*self.batch, float(self._counter.flops)))
            self._counter.flops = 0

    def end_warmup(self, device: torch.device, *, compare_with_matmul: bool) -> None:
        """Stop counting FLOPs, measure the device's rate of matrix products if wanted, and count tokens anew."""
        self.stop_counting_flops()
        if compare_with_matmul and self.dtype is not None:
            try:
                self._matmul_rate = matmul_rate(device, self.dtype)
            except torch.OutOfMemoryError:
                logger.warning("not enough memory is left to measure the device's rate of matrix products")
        self._tokens = TokenCounter()

    def stop_counting_flops(self) -> None:
        """Stop counting FLOPs, if they are counted."""
        if self._counter is not None:
            self.dtype = next((dtype for dtype, _ in self._counter.by_dtype.most_common(1)), None)
            self._counter.__exit__(None, None, None)
            self._counter = None

    def rates(self, seconds: float) -> dict[str, Any]:
        """Return the rates of `ProfileReport`, for the seconds since the warm-up; NaN where there is no figure."""
        tokens, squares = self._tokens.totals()
        linear, square = flops_per_token(self._flops_of_batches)
        samples, slots = self._tokens.samples or math.nan, self._tokens.slots or math.nan
        return {
            "samples_per_second": samples / seconds,
            "residues_per_second": (tokens - SPECIAL_TOKENS * samples) / seconds,
            "tokens_per_second": slots / seconds,
            "non_padding": tokens / slots,
            "model_flops_per_second": (linear * tokens + square * squares or math.nan) / seconds,
            "matmul_flops_per_second": self._matmul_rate,
        }
