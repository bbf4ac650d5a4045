"""Count the work of a model in tokens and FLOPs, and measure the rates of a device to compare it with."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import flop_counter

from esm_efficient._torch import (
    TorchDispatchMode,
    cpu_attention_operations,
    is_kernel,
    operation_of,
    with_flex_attention,
)
from esm_efficient.costs.devices import Backend, Device
from esm_efficient.tasks import SPECIAL_TOKENS

_CPU_ATTENTION, _CPU_ATTENTION_BACKWARD = cpu_attention_operations()
_LONG_SECONDS = 0.5
"""Time of one matrix product from which a smaller one is measured."""


def flops_of(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Return the FLOPs of one operation by torch's formulas; a multiply-add counts as two."""
    operation = operation_of(func)
    if operation is _CPU_ATTENTION:
        return flop_counter.sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if operation is _CPU_ATTENTION_BACKWARD:
        return flop_counter.sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    formula = flop_counter.flop_registry.get(operation)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


@with_flex_attention
class WorkCounter(TorchDispatchMode):
    """Counts the FLOPs of the operations that run while it is entered; recomputation is not counted.

    Args:
        phase: returns the phase of training that runs now.

    Attributes:
        flops: FLOPs so far.
        by_dtype: FLOPs so far by the dtype of the result.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        super().__init__()
        self.flops = 0
        self.by_dtype: Counter[torch.dtype] = Counter()
        self._phase = phase

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its FLOPs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        phase = self._phase()
        if phase == "forward" or (phase == "backward" and not torch.is_grad_enabled()):
            flops = flops_of(func, args, kwargs, result)
            if flops:
                self.flops += flops
                first = result if isinstance(result, Tensor) else result[0]
                self.by_dtype[first.dtype] += flops
        return result


class TokenCounter:
    """Counts the sequences and tokens that go into a model, on the device and without waiting for it.

    Attributes:
        samples: number of sequences.
        slots: number of tokens, padding included; 0 if the model gets pooled states only.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.slots = 0
        self._sums: Tensor | None = None

    def add(self, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
        """Count a batch by its ``input_ids`` or ``inputs_embeds``, and its ``attention_mask``.

        States with no more columns than a protein of one residue are pooled (`StatesCollator`): they count as
        sequences and have no tokens.

        Returns:
            Sequences and tokens per sequence; None without tokens.
        """
        tokens, mask, pooled = inputs.get("input_ids"), inputs.get("attention_mask"), 0
        if tokens is None:
            tokens, pooled = inputs.get("inputs_embeds"), SPECIAL_TOKENS + 1
        if not isinstance(tokens, Tensor) or tokens.dim() != (3 if pooled else 2):
            return None
        rows, width = tokens.shape[:2]
        self.samples += rows
        if width <= pooled:
            return None
        self.slots += rows * width
        if isinstance(mask, Tensor) and mask.shape == (rows, width):
            lengths = mask.sum(1, dtype=torch.float64 if mask.device.type != "mps" else torch.float32)
        else:
            lengths = torch.full((rows,), float(width), device=tokens.device)
        sums = torch.stack([lengths.sum(), lengths.square().sum()])
        self._sums = sums if self._sums is None else self._sums + sums
        return rows, width

    def totals(self) -> tuple[float, float]:
        """Return the number of tokens without padding, and the sum of squared lengths; NaN if there were no tokens."""
        if self._sums is None:
            return math.nan, math.nan
        tokens, squares = self._sums.tolist()
        return tokens, squares


def flops_per_token(batches: list[tuple[int, int, float]]) -> tuple[float, float]:
    """Fit the FLOPs of a sequence as ``linear * tokens + square * tokens**2``; the square part is attention.

    Args:
        batches: per measured batch the number of sequences, the tokens per sequence (padding included) and the FLOPs.

    Returns:
        ``linear`` and ``square``; zeros without batches.

    Example:
        >>> flops_per_token([(2, 10, 2 * (10 * 7 + 100 * 3)), (1, 20, 20 * 7 + 400 * 3)])
        (7.0, 3.0)
    """
    if not batches:
        return 0.0, 0.0
    rows, tokens, flops = (np.array(column, dtype=np.float64) for column in zip(*batches, strict=True))
    if np.unique(tokens).size > 1:
        design = np.stack([rows * tokens, rows * tokens**2], axis=1)
        scale = design.max(axis=0)
        linear, square = np.linalg.lstsq(design / scale, flops, rcond=None)[0] / scale
        if linear > 0 and square >= 0:
            return round(float(linear), 6), round(float(square), 6)
    return float(flops.sum() / (rows * tokens).sum()), 0.0


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measure the rate at which a device multiplies large matrices, an upper limit for any model.

    Args:
        device: the device to measure.
        dtype: dtype of the matrices.

    Returns:
        FLOP/s, the median of five measurements.

    Example:
        >>> matmul_rate("cpu", torch.float32) > 1e8
        True
    """
    device = torch.device(device)
    if device.type != "cpu":
        return _matmul_rate(device, dtype, 4096)
    rate = _matmul_rate(device, dtype, 256)
    # A product of the larger size takes seconds in a dtype that the CPU only emulates, such as bf16 on many.
    return rate if 2 * 1024**3 / rate > _LONG_SECONDS else _matmul_rate(device, dtype, 1024)


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Measure `matmul_rate` with square matrices of a size."""
    with torch.no_grad():
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(7):  # the first two warm up
            synchronize(device)
            began = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            times.append(time.perf_counter() - began)
    del left, right
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that the memory of these matrices appears in no report
    return 2 * size**3 / statistics.median(times[2:])


def launch_seconds(device: torch.device | str) -> float:
    """Measure the time that the host needs to launch a kernel from eager PyTorch, autograd included.

    Small layers run forward and backward. Their kernels take no time themselves, on a GPU while the host goes on, and
    on a CPU because the tensors are tiny.

    Args:
        device: the device to measure.

    Returns:
        Seconds per kernel, the median of five measurements.

    Example:
        >>> 1e-7 < launch_seconds("cpu") < 1e-3
        True
    """
    device = torch.device(device)
    layer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(20))).to(device)
    inputs = torch.ones(1, 8, device=device)
    times = []
    kernels = _KernelCounter()
    with torch.enable_grad():
        with kernels:
            model(inputs).sum().backward()
        for _ in range(7):  # the first two warm up
            synchronize(device)
            model.zero_grad()
            began = time.perf_counter()
            model(inputs).sum().backward()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:]) / kernels.number


class _KernelCounter(TorchDispatchMode):
    """Counts the kernels that run while it is entered."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += is_kernel(func)
        return func(*args, **(kwargs or {}))


def copy_bandwidth(device: torch.device | str) -> float:
    """Measure the rate at which a device reads and writes its memory.

    Args:
        device: the device to measure.

    Returns:
        Bytes per second, the median of five measurements.

    Example:
        >>> copy_bandwidth("cpu") > 1e7
        True
    """
    device = torch.device(device)
    source = torch.ones((64 if device.type == "cpu" else 512) * 2**18, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):  # the first two warm up
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(times[2:])


def measure_device(device: torch.device | str) -> Device:
    """Measure a device of this machine, for estimates instead of the figures of data sheets.

    Rates are those of large matrix products and copies. `Device.launch_seconds` is the time per kernel of small layers.
    It takes a few seconds on a CPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"mps"``, or one of several GPUs.

    Returns:
        The device. Its ``memory`` is that of a GPU, and 0 for a CPU.

    Example:
        >>> measure_device("cpu").backend
        'cpu'
    """
    device = torch.device(device)
    dtypes = [torch.float32]
    memory, name = 0, f"this {device.type}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, name = properties.total_memory, properties.name
        dtypes += [torch.float16, *([torch.bfloat16] if properties.major >= 8 else [])]
    elif device.type == "mps":
        memory = torch.mps.recommended_max_memory()
        dtypes += [torch.float16, torch.bfloat16]
    return Device(
        name,
        cast(Backend, device.type),
        memory,
        {str(dtype).removeprefix("torch."): matmul_rate(device, dtype) for dtype in dtypes},
        copy_bandwidth(device),
        launch_seconds(device),
        source="measured on this machine",
    )


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all work that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
