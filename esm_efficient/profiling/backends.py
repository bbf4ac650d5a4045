"""Memory of a device during training: one class per backend, which measures the peaks and splits them by category."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from esm_efficient._torch import is_innermost, storage_key
from esm_efficient.adapters.registry import encoder_layers
from esm_efficient.costs.allocations import AllocationTracker, model_tensors, storage_bytes, tensors_in
from esm_efficient.costs.memory import Memory, Phase
from esm_efficient.profiling.phases import PassStage, PhaseTracker, Stage

logger = logging.getLogger(__name__)


class Backend(ABC):
    """Measures the memory of a training loop on one kind of device, between `start` and `stop`.

    Attributes:
        counted: what the figures count, for the report.
        detailed: look closely at this step: operation by operation on a CPU, layer by layer on a GPU.
        peaks: highest bytes of tensors so far, by phase and category.
        reserved: highest bytes that torch's allocator had reserved so far, by phase.
    """

    counted = ""

    def __init__(self, model: nn.Module, device: torch.device, phases: PhaseTracker) -> None:
        self.detailed = True
        self.peaks: dict[Phase, Memory] = {}
        self.reserved: dict[Phase, int] = {}
        # Kept, because a walk through the modules of a large model takes milliseconds.
        self._parameters = list(model.parameters())
        self._device = device
        self._phases = phases
        self._handles: list[Any] = []

    def record_peak(self, phase: Phase, memory: Memory, reserved: int = 0) -> None:
        """Record a peak if it is the phase's highest."""
        if phase not in self.peaks or memory.total >= self.peaks[phase].total:
            self.peaks[phase] = memory
        self.reserved[phase] = max(self.reserved.get(phase, 0), reserved)

    @abstractmethod
    def switch(self, ended: Phase, stage: Stage) -> None:
        """Record the peak of the phase that ended, before a stage begins."""

    @abstractmethod
    def set_optimizer_state(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors as optimizer state from now on."""

    @abstractmethod
    def held(self) -> Memory:
        """Return the memory in use now."""

    @abstractmethod
    def discard_peak(self) -> None:
        """Forget the peak since the last phase."""

    def start(self, optimizer_state: Sequence[Tensor]) -> None:
        """Start to measure; these tensors are the optimizer state so far."""
        self.set_optimizer_state(optimizer_state)

    def begin_pass(self, stage: PassStage, inputs: Sequence[Tensor]) -> None:
        """Prepare for a call of the model with these tensors."""
        return

    def end_evaluation(self) -> None:
        """Finish a forward pass without gradients."""
        return

    def end_step(self) -> Memory | None:
        """Return the memory that an optimizer step left behind, or None if it was not counted."""
        return self.held()

    def stop(self) -> None:
        """Stop measuring and remove all hooks."""
        for handle in self._handles:
            handle.remove()


class CpuBackend(Backend):
    """Counts the live tensors of a CPU exactly, operation by operation.

    Counting is slow, so it is switched on in detailed steps only, and for batches larger than those counted before.
    """

    counted = "bytes of live CPU tensors, counted at every operation; memory that kernels use internally is not counted"

    def __init__(self, model: nn.Module, device: torch.device, phases: PhaseTracker) -> None:
        super().__init__(model, device, phases)
        self._tracker = AllocationTracker()
        self._tracker.hold(model_tensors(model), "weights")
        self._counts = False
        self._largest: dict[PassStage, int] = {"forward": 0, "evaluation": 0}
        for parameter in self._parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_gradient))

    def begin_pass(self, stage: PassStage, inputs: Sequence[Tensor]) -> None:
        """Start to count if the step is a detailed one or the inputs are the largest so far."""
        if self._counts:
            return
        size = sum(tensor.numel() for tensor in inputs)
        if (stage == "forward" and self.detailed) or size > self._largest[stage]:
            self._largest[stage] = max(size, self._largest[stage])
            self._tracker.hold(inputs, "other")
            self._tracker.hold((p.grad for p in self._parameters), "gradients")
            self._tracker.reset_peak()
            self._tracker.__enter__()
            self._counts = True

    def switch(self, ended: Phase, stage: Stage) -> None:
        """Record the peak of the phase that ended; choose the category of new tensors."""
        self._close(ended)
        self._tracker.category = "activations" if stage in ("forward", "evaluation") else "other"
        self._tracker.recomputes = stage == "backward"

    def end_evaluation(self) -> None:
        """Stop counting."""
        self._stop_counting()

    def end_step(self) -> Memory | None:
        """Stop counting; return the live tensors, or None if the step was not counted."""
        held = self.held() if self._counts else None
        self._stop_counting()
        return held

    def set_optimizer_state(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors as optimizer state."""
        self._tracker.hold(tensors, "optimizer")

    def held(self) -> Memory:
        """Return the bytes of live tensors."""
        return self._tracker.current

    def discard_peak(self) -> None:
        """Start a new peak."""
        self._tracker.reset_peak()

    def stop(self) -> None:
        """Stop counting and remove the hooks."""
        self._stop_counting()
        super().stop()

    def _after_gradient(self, parameter: Tensor) -> None:
        if self._counts:
            self._tracker.hold([parameter.grad], "gradients")

    def _close(self, phase: Phase) -> None:
        if self._counts:
            self.record_peak(phase, self._tracker.peak)
            self._tracker.reset_peak()

    def _stop_counting(self) -> None:
        if self._counts:
            self._close(self._phases.phase)
            self._counts = False
            if not is_innermost(self._tracker):
                logger.warning(
                    "another dispatch mode of torch, such as FlopCounterMode, began or ended within a profiled step, "
                    "so the figures of this step are wrong: enter it before the Profiler, and leave it after"
                )
            self._tracker.__exit__(None, None, None)


class GradientBytes:
    """The bytes of gradients, followed through a step without looking at every parameter at every change.

    Gradients appear in a backward pass, and disappear only before the next forward pass.

    Args:
        parameters: all parameters of the model.
        device: gradients elsewhere do not count.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        self._device = device
        self.recount()

    def recount(self) -> int:
        """Look at all parameters; return the bytes."""
        self._sizes: dict[int, int] = {}
        self._waiting = self._parameters
        return self.update()

    def update(self) -> int:
        """Look at the parameters that had no gradient the last time; return the bytes."""
        waiting = []
        for parameter in self._waiting:
            gradient = parameter.grad
            if gradient is None:
                waiting.append(parameter)
            elif gradient.device == self._device:
                storage = gradient.untyped_storage()
                self._sizes[storage_key(storage)] = storage.nbytes()  # once, if several gradients share it
        self._waiting = waiting
        return sum(self._sizes.values())


class TotalsBackend(Backend):
    """Splits the totals that a GPU's allocator counts.

    Weights, gradients and optimizer state are known from their tensors. The rest is split at the borders of layers: in
    a forward pass it is activations; in a backward pass activations are what was in use when the highest layer began.
    """

    def __init__(self, model: nn.Module, device: torch.device, phases: PhaseTracker) -> None:
        super().__init__(model, device, phases)
        self._weights = storage_bytes(model_tensors(model), device)
        self._optimizer = self._gradients = self._held = self._before = 0
        self._gradient_bytes = GradientBytes(self._parameters, device)
        for layer in encoder_layers(model):
            self._handles += [
                layer.register_forward_pre_hook(lambda *_: self._begin_layer("forward")),
                layer.register_forward_hook(self._after_layer),
            ]
            # Recomputation may skip the layer's own hooks, but it runs those of the layer's children. It stops with an
            # exception as soon as it has all that it needs, hence always_call.
            self._handles += [
                child.register_forward_hook(self._after_child, always_call=True) for child in layer.children()
            ]

    def start(self, optimizer_state: Sequence[Tensor]) -> None:
        """Reset the allocator's peak; memory that is in use already counts as other."""
        super().start(optimizer_state)
        self.discard_peak()
        self._held = self._current()
        self._before = max(self._held - self._weights - self._optimizer, 0)

    @abstractmethod
    def _current(self) -> int:
        """Return the bytes in use now."""

    @abstractmethod
    def _take_peak(self) -> tuple[int, int]:
        """Return the peaks of used and of reserved bytes since the last call."""

    def switch(self, ended: Phase, stage: Stage) -> None:
        """Record the peak of the phase that ended."""
        self._close(ended)
        if stage == "forward":
            self._gradients = self._gradient_bytes.recount()

    def set_optimizer_state(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors as optimizer state."""
        self._optimizer = storage_bytes(tensors, self._device)

    def held(self) -> Memory:
        """Return the memory in use now, split by category."""
        now = self._current()
        return self._split(now, now, self._gradient_bytes.recount())

    def discard_peak(self) -> None:
        """Reset the allocator's peak."""
        self._take_peak()

    def _begin_layer(self, phase: Literal["forward", "backward"]) -> None:
        if self._phases.stage == phase and self.detailed:
            self._close(phase)

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        tensor = next(tensors_in(output), None)
        if self._phases.stage == "forward" and tensor is not None and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda _: self._begin_layer("backward"))

    def _after_child(self, child: nn.Module, args: tuple, output: Any) -> None:
        if self._phases.stage == "backward" and self.detailed:
            self._close("backward", recomputed=True)

    def _close(self, phase: Phase, *, recomputed: bool = False) -> None:
        """Record the peak since the last call under a phase."""
        now = self._current()
        peak, reserved = self._take_peak()
        # A forward pass allocates activations. A backward pass frees activations, so they are there when it begins.
        held = peak if recomputed or phase in ("forward", "evaluation") else self._held
        self.record_peak(phase, self._split(peak, held, self._gradients), reserved)
        self._held = now
        if phase == "backward" and not recomputed:
            self._gradients = self._gradient_bytes.update()

    def _split(self, peak: int, held: int, gradients: int) -> Memory:
        return split(
            peak, held, weights=self._weights, gradients=gradients, optimizer=self._optimizer, before=self._before
        )


class CudaBackend(TotalsBackend):
    """The counters of torch's CUDA allocator, which are reset at every phase."""

    counted = (
        "bytes that torch's CUDA allocator had handed out; activations are, in a forward pass, all bytes beyond "
        "weights, gradients and optimizer state, and in a backward pass those in use when the highest layer began"
    )

    def _current(self) -> int:
        return torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]["current"]

    def _take_peak(self) -> tuple[int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]


class MpsBackend(TotalsBackend):
    """Apple's GPUs, for which torch counts the bytes in use and no peak."""

    counted = (
        "bytes that torch uses on the GPU, read when a phase or a layer begins or ends: MPS counts no peak, so a peak "
        "in between is missed"
    )

    def __init__(self, model: nn.Module, device: torch.device, phases: PhaseTracker) -> None:
        self._peak = (0, 0)
        super().__init__(model, device, phases)

    def _current(self) -> int:
        now = torch.mps.current_allocated_memory()
        self._peak = (max(self._peak[0], now), max(self._peak[1], torch.mps.driver_allocated_memory()))
        return now

    def _take_peak(self) -> tuple[int, int]:
        self._current()
        peak, self._peak = self._peak, (0, 0)
        return peak


def make_backend(model: nn.Module, device: torch.device, phases: PhaseTracker) -> Backend:
    """Return the backend of a device."""
    kinds: dict[str, type[Backend]] = {"cuda": CudaBackend, "mps": MpsBackend}
    return kinds.get(device.type, CpuBackend)(model, device, phases)


def split(peak: int, held: int, *, weights: int, gradients: int, optimizer: int, before: int = 0) -> Memory:
    """Split a peak that is known as a total only.

    Args:
        peak: bytes at the highest moment.
        held: bytes in use when the work that led to the peak began.
        weights: bytes of parameters and buffers.
        gradients: bytes of gradients when the work began.
        optimizer: bytes of optimizer state.
        before: bytes of other tensors that existed before training.

    Returns:
        Categories that sum to `peak`: activations are the bytes of `held` beyond the known ones, other is the rest.

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
