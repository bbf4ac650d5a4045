"""The segments of a training step: what each of them allocates and costs, and their recording while a model runs."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from esm_efficient import _torch
from esm_efficient.adapters.registry import encoder_layers
from esm_efficient.costs.allocations import AllocationTracker, tensors_in
from esm_efficient.costs.devices import Device
from esm_efficient.costs.memory import Memory
from esm_efficient.costs.throughput import flops_of
from esm_efficient.trunk.split import SkippedLayer

_CUDA_BLOCK = 512
"""Bytes that torch's CUDA allocator rounds up to."""
_FIGURES = 4
"""Number of figures in a segment's cost."""


@dataclass(frozen=True)
class Segment:
    """A part of a step.

    Attributes:
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        part: ``"layer 3"``, or the name of a part outside the layers.
        start: bytes in use at its beginning, int64 of shape (categories,).
        peak: bytes in use at its highest moment, likewise.
        end: bytes in use at its end, likewise.
        cost: float64 of shape (4,): FLOPs, bytes moved, seconds that the device is busy, kernels.
    """

    phase: str
    part: str
    start: np.ndarray
    peak: np.ndarray
    end: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """The segments of a step in order, and the parameters of its model."""

    segments: tuple[Segment, ...]
    trainable_parameters: int
    total_parameters: int

    @property
    def costs(self) -> np.ndarray:
        """The costs of the segments, of shape (segments, 4)."""
        return np.array([segment.cost for segment in self.segments])


def seconds_of(costs: np.ndarray, device: Device) -> np.ndarray:
    """Return the time of each part of a step; NaN if the device's rates are unknown.

    A GPU works while the host launches the next kernels, so that a step takes as long as the slower of the two. On a
    CPU there is nothing to overlap, and the times are added.

    Args:
        costs: costs of the parts, of shape (parts, 4), as in `Segment`.
        device: the device.
    """
    busy, launching = costs[:, 2], costs[:, 3] * device.launch_seconds
    if not device.flops_per_second or not device.bandwidth:
        return np.full(len(costs), np.nan)
    if device.backend == "cpu":
        return busy + launching
    return launching if launching.sum() > busy.sum() else busy


class Recorder:
    """Cuts a step into segments while its model runs.

    Args:
        device: decides how allocations are rounded and how long operations take.

    Attributes:
        tracker: counts the allocations; to be entered around the step.
        segments: the segments so far.
    """

    def __init__(self, device: Device) -> None:
        self.tracker = AllocationTracker(
            granularity=_CUDA_BLOCK if device.backend == "cuda" else 1, observer=self._add_operation
        )
        self.segments: list[Segment] = []
        self._device = device
        self._cost = np.zeros(_FIGURES)
        self._open: tuple[str, str, np.ndarray] | None = None

    def begin(self, phase: str, part: str) -> None:
        """End the current segment and begin the next one."""
        self.end()
        self.tracker.reset_peak()
        self.tracker.category = "activations" if phase == "forward" else "other"
        self.tracker.recomputes = phase == "backward"
        self._open, self._cost = (phase, part, _vector(self.tracker.current)), np.zeros(_FIGURES)

    def end(self) -> None:
        """End the current segment, if there is one."""
        if self._open is not None:
            peak, now = _vector(self.tracker.peak), _vector(self.tracker.current)
            self.segments.append(Segment(*self._open, peak, now, self._cost))
            self._open = None

    def watch(self, model: nn.Module) -> None:
        """Begin a segment whenever a layer of the model begins its forward or its backward pass."""
        layers = encoder_layers(model)
        computed = [number for number, layer in enumerate(layers) if not isinstance(layer, SkippedLayer)]
        for number in computed:
            self._watch_layer(layers[number], number, is_first=number == computed[0])
        for layer in layers[-1:]:
            layer.register_forward_hook(lambda *_: self.begin("forward", "head") if self._is_forward else None)

    @property
    def _is_forward(self) -> bool:
        """Whether the forward pass runs; in the backward pass layers run again to be recomputed."""
        return self._open is not None and self._open[0] == "forward"

    def _watch_layer(self, layer: nn.Module, number: int, *, is_first: bool) -> None:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._is_forward:
                if is_first:
                    self._begin_at_gradient(inputs[0], "embeddings")
                self.begin("forward", f"layer {number}")

        def after(layer: nn.Module, inputs: Any, output: Any) -> None:
            if self._is_forward:
                self._begin_at_gradient(next(tensors_in(output)), f"layer {number}")

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def _begin_at_gradient(self, tensor: Tensor, part: str) -> None:
        """Begin a segment of the backward pass when the gradient of a tensor is known."""
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda _: self.begin("backward", part))

    def _add_operation(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Add an operation to the costs of the segment: a roofline of its FLOPs and of the bytes that it moves.

        Each operation counts as one kernel. Some have two or three, such as the backward pass of a layer norm.
        """
        if not _torch.is_kernel(func):
            return
        flops = flops_of(func, args, kwargs, result)
        moved = sum(map(_size, tensors_in((args, kwargs, result))))
        seconds = 0.0
        rates = self._device.flops_per_second
        if rates and self._device.bandwidth:
            first = next(tensors_in(result), None)
            dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
            rate = rates.get(dtype) or rates.get("float32") or max(rates.values())
            seconds = max(flops / rate, moved / self._device.bandwidth)
        self._cost += (flops, moved, seconds, 1)


def memory_of(vector: np.ndarray) -> Memory:
    """Return bytes by category from the numbers of a segment."""
    return Memory(*map(int, vector))


def _vector(memory: Memory) -> np.ndarray:
    return np.array(astuple(memory), dtype=np.int64)


def _size(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves; a broadcast tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
