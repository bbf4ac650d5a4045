"""Profiler: what a training loop costs, phase by phase, while it runs."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient.adapters.registry import encoder_layers
from esm_efficient.costs.allocations import AllocationTracker
from esm_efficient.costs.memory import PHASES, Memory, OutOfMemoryError, resident_peak, restart_resident_peak
from esm_efficient.costs.throughput import TokenCounter, WorkCounter, flops_per_token, matmul_rate
from esm_efficient.errors import ConfigurationError
from esm_efficient.profiling.backends import (
    Counter,
    CpuCounter,
    CudaCounter,
    MpsCounter,
    driver_bytes,
    model_tensors,
    split,
    storage_bytes,
)
from esm_efficient.profiling.clock import PhaseClock
from esm_efficient.profiling.report import Growth, PhaseFigures, ProfileReport, find_growth
from esm_efficient.tasks import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

_WINDOW = 16
"""Step ends that growth is looked for in."""


class Profiler:
    """Measures memory and throughput of a training loop, by phase; a context manager around the loop.

    The phases are found by hooks: on the model (forward, evaluation), on its output's gradient (backward), on the end
    of the backward pass, and on the optimizer. The time between an optimizer step and the next forward pass is the
    phase ``data``. Nothing stays installed after the block.

    On CUDA, memory comes from the allocator's own counters, which the profiler resets at every phase. On a CPU every
    operation of a step is counted, in the warm-up, in every tenth step, and whenever a batch is larger than those
    counted before. What the other steps leave behind is not seen: look at every step (``every=1``) to size a leak. On
    MPS there is no peak, only what is held when a phase begins or ends.

    Args:
        model: what is trained; its forward pass takes ``input_ids`` and ``attention_mask`` by keyword.
        optimizer: torch's, or accelerate's wrapper of one. Without it there is no optimizer phase.
        warmup_steps: optimizer steps that no rate includes. FLOPs are counted in these, so with none there is no
            ``model_flops_per_second``.
        compare_with_matmul: measure the device's rate of matrix products at the end of the warm-up.
        every: optimizer steps from one in which memory is looked at closely to the next: operation by operation on a
            CPU, layer by layer on a GPU.
        accumulation: micro-batches an optimizer step, for the advice when memory runs out.

    Raises:
        ConfigurationError: the model has no parameters, `warmup_steps` is negative, or `every` is below 1.
        OutOfMemoryError: from the block, in place of torch's own, with what was held and what would fit.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Profiler(model, optimizer, warmup_steps=0) as profiler:
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).sum().backward()
        ...         optimizer.step()
        ...         profiler.step()
        >>> profiler.report().steps
        3
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        warmup_steps: int = 2,
        compare_with_matmul: bool = True,
        every: int = 10,
        accumulation: int = 1,
    ) -> None:
        first = next(model.parameters(), None)
        if first is None:
            raise ConfigurationError(f"{type(model).__name__} has no parameters, so there is nothing to profile")
        if warmup_steps < 0 or every < 1:
            raise ConfigurationError(f"warmup_steps={warmup_steps}, every={every}: expected at least 0 and 1")
        self.model = model
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.device = first.device
        self._warmup = warmup_steps
        self._compare = compare_with_matmul
        self._every = every
        self._accumulation = accumulation
        self._hooks: list[Any] = []

    def __enter__(self) -> Profiler:
        """Install the hooks and start to count."""
        self.steps = 0
        self.batch: tuple[int, int] | None = None
        self._peaks: dict[str, Memory] = {}
        self._reserved: dict[str, int] = {}
        self._ends: deque[Memory] = deque(maxlen=_WINDOW)
        self._growth: Growth | None = None
        self._tokens = TokenCounter()
        self._batches: list[tuple[int, int, float]] = []
        self._matmul = math.nan
        self._phase, self._states, self._gradients_wait = "between", -1, False
        self._dtype: torch.dtype | None = None
        self._counts_operations, self._largest = False, dict.fromkeys(("forward", "evaluation"), 0)
        restart_resident_peak()

        self._counter = self._make_counter()
        self._tracker = self._counter.tracker if isinstance(self._counter, CpuCounter) else None
        if self._tracker is not None:
            self._tracker.hold(model_tensors(self.model), "weights")
        self._weights = storage_bytes(model_tensors(self.model), self.device)
        self._state_bytes = self._gradients = 0
        self._note_state()
        self._install()
        self._work: WorkCounter | None = None
        if self._warmup:
            self._work = WorkCounter(lambda: self._phase)
            self._work.__enter__()
        self._held = self._counter.current()
        self._before = max(self._held - self._weights - self._state_bytes, 0)
        self._clock = PhaseClock(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off; explain an out-of-memory error."""
        if error is None:
            self._switch("between")
        self._resident = resident_peak()
        self._stop_counting_operations()
        self._stop_counting_work()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if isinstance(error, torch.OutOfMemoryError):
            raise self._explain(error) from error

    def step(self) -> None:
        """Say that an optimizer step, with all that belongs to it, has ended."""
        self.steps += 1
        self._close_batch()
        if self._tracker is None or self._counts_operations:
            self._ends.append(self._now_held())
            self._look_for_growth()
        self._stop_counting_operations()
        if self.steps == self._warmup:
            self._end_warmup()
        self._clock.seconds(wait=False)  # so that what is waited for does not pile up

    def report(self) -> ProfileReport:
        """What was measured so far."""
        by_phase = self._clock.seconds()
        seconds = math.nan
        if self.steps > self._warmup:
            seconds = sum(s for name, s in by_phase.items() if name != "evaluation") or math.nan
        tokens, squares = self._tokens.totals()
        linear, square = flops_per_token(self._batches)
        in_use, driver = driver_bytes(self.device)
        return ProfileReport(
            device=str(self.device),
            counted=self._counter.counted,
            phases={
                name: PhaseFigures(self._peaks[name], self._reserved[name], by_phase.get(name, 0.0))
                for name in PHASES
                if name in self._peaks
            },
            peak_phase=max(self._peaks, key=lambda name: self._peaks[name].total, default=""),
            steps=self.steps,
            warmup_steps=self._warmup,
            samples_per_second=self._tokens.samples / seconds,
            residues_per_second=(tokens - SPECIAL_TOKENS * self._tokens.samples) / seconds,
            tokens_per_second=self._tokens.slots / seconds,
            non_padding=tokens / self._tokens.slots if self._tokens.slots else math.nan,
            model_flops_per_second=(linear * tokens + square * squares or math.nan) / seconds,
            matmul_flops_per_second=self._matmul,
            driver_bytes=in_use,
            driver=driver,
            resident_bytes=resident_peak() if self._hooks else self._resident,
            growth=self._growth,
        )

    def _make_counter(self) -> Counter:
        if self.device.type == "cuda":
            return CudaCounter(self.device)
        return MpsCounter() if self.device.type == "mps" else CpuCounter(AllocationTracker())

    def _install(self) -> None:
        model, optimizer = self.model, self.optimizer
        self._hooks += [
            model.register_forward_pre_hook(self._forward_begins, with_kwargs=True),
            model.register_forward_hook(self._forward_ends),
        ]
        if optimizer is not None:
            self._hooks += [
                optimizer.register_step_pre_hook(lambda *_: self._switch("optimizer")),
                optimizer.register_step_post_hook(self._optimizer_ends),
            ]
        if self._tracker is not None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_came))
            return
        for layer in encoder_layers(model):
            self._hooks += [
                layer.register_forward_pre_hook(lambda *_: self._layer_begins("forward")),
                layer.register_forward_hook(self._layer_ends),
            ]
            # Recomputation need not come by the layer's own hooks, but it comes by those of its parts, and stops with
            # an exception as soon as it has what it needs.
            self._hooks += [part.register_forward_hook(self._part_ends, always_call=True) for part in layer.children()]

    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        phase = "forward" if model.training and torch.is_grad_enabled() else "evaluation"
        self._switch(phase)
        if phase == "forward":
            self._close_batch()
            self.batch = self._tokens.add(kwargs)
        if self._tracker is not None and not self._counts_operations:
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            size = sum(tensor.numel() for tensor in inputs)
            due = phase == "forward" and self._looks_closely
            if due or size > self._largest[phase]:
                self._largest[phase] = max(size, self._largest[phase])
                self._tracker.hold(inputs, "other")
                self._tracker.hold((p.grad for p in model.parameters()), "gradients")
                self._tracker.reset_peak()
                self._tracker.__enter__()
                self._counts_operations = True

    def _forward_ends(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._phase == "forward":
            for tensor in _outputs(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _: self._backward_begins())
        elif self._phase == "evaluation":
            self._switch("evaluation")
            self._stop_counting_operations()

    @property
    def _looks_closely(self) -> bool:
        return self.steps < self._warmup or self.steps % self._every == 0

    def _stop_counting_operations(self) -> None:
        if self._tracker is not None and self._counts_operations:
            self._close_segment("data" if self._phase == "between" else self._phase)
            self._counts_operations = False
            self._tracker.__exit__(None, None, None)

    def _gradient_came(self, parameter: Tensor) -> None:
        if self._tracker is not None and self._counts_operations:
            self._tracker.hold([parameter.grad], "gradients")

    def _backward_begins(self) -> None:
        if self._phase == "forward":
            self._switch("backward")
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._switch("between"))

    def _optimizer_ends(self, *_: Any) -> None:
        self._switch("between")
        self._note_state()

    def _layer_begins(self, phase: str) -> None:
        if self._phase == phase and self._looks_closely:
            self._close_segment(phase)

    def _layer_ends(self, layer: nn.Module, args: tuple, output: Any) -> None:
        tensor = next(_outputs(output), None)
        if self._phase == "forward" and tensor is not None and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda _: self._layer_begins("backward"))

    def _part_ends(self, part: nn.Module, args: tuple, output: Any) -> None:
        if self._phase == "backward" and self._looks_closely:
            self._close_segment("backward", computes=True)

    def _switch(self, phase: str) -> None:
        """End the phase that runs and begin another."""
        ended = self._phase
        if ended == "between":
            # Clipping belongs to the optimizer's step that follows; what comes before a batch is the wait for it.
            ended = phase if phase in ("optimizer", "evaluation") else "data"
        elif ended == "backward":
            self._gradients_wait = True
        elif ended == "optimizer" and phase == "between":
            self._gradients_wait = False
        self._clock.lap(ended)
        self._close_segment(ended)
        self._phase = phase
        if self._tracker is not None:
            self._tracker.category = "activations" if phase in ("forward", "evaluation") else "other"
            self._tracker.recomputes = phase == "backward"

    def _close_segment(self, phase: str, *, computes: bool = False) -> None:
        """Note the peak since the last call under a phase; whether layers were computed in it."""
        if self._tracker is not None:
            if not self._counts_operations:
                return
            memory, reserved = self._tracker.peak, 0
            self._tracker.reset_peak()
        else:
            now = self._counter.current()
            peak, reserved = self._counter.take_peak()
            # What a forward pass allocates are activations. What a backward pass frees of them is there when it begins.
            held = peak if computes or phase in ("forward", "evaluation") else self._held
            memory = self._split(peak, held, self._gradients)
            self._held = now
            self._gradients = storage_bytes((p.grad for p in self.model.parameters()), self.device)
        if phase not in self._peaks or memory.total >= self._peaks[phase].total:
            self._peaks[phase] = memory
        self._reserved[phase] = max(self._reserved.get(phase, 0), reserved)

    def _note_state(self) -> None:
        """Count the optimizer's state; it is made in the first step, and then stays."""
        if self.optimizer is None or len(self.optimizer.state) == self._states:
            return
        self._states = len(self.optimizer.state)
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        self._state_bytes = storage_bytes(tensors, self.device)
        if self._tracker is not None:
            self._tracker.hold(tensors, "optimizer")

    def _now_held(self) -> Memory:
        if self._tracker is not None:
            return self._tracker.current
        gradients = storage_bytes((p.grad for p in self.model.parameters()), self.device)
        now = self._counter.current()
        return self._split(now, now, gradients)

    def _split(self, peak: int, held: int, gradients: int) -> Memory:
        return split(
            peak,
            held,
            weights=self._weights,
            gradients=gradients,
            optimizer=self._state_bytes,
            before=self._before,
        )

    def _close_batch(self) -> None:
        """Note the FLOPs of the micro-batch that has ended, while they are counted."""
        if self._work is not None:
            if self.batch is not None and self._work.flops:
                self._batches.append((*self.batch, float(self._work.flops)))
            self._work.flops = 0

    def _stop_counting_work(self) -> None:
        if self._work is not None:
            self._dtype = next((dtype for dtype, _ in self._work.by_dtype.most_common(1)), None)
            self._work.__exit__(None, None, None)
            self._work = None

    def _end_warmup(self) -> None:
        """Start the clocks."""
        self._stop_counting_work()
        self._ends.clear()
        if self._compare and self._dtype is not None:
            try:
                self._matmul = matmul_rate(self.device, self._dtype)
            except torch.OutOfMemoryError:
                logger.warning("no memory is left to measure the device's rate of matrix products")
        self._tokens = TokenCounter()
        self._counter.take_peak()  # that of the products is nobody's
        self._clock.restart()

    def _look_for_growth(self) -> None:
        """Look for memory that steps leave behind; the first finding is logged, the last one reported."""
        found = find_growth(list(self._ends))
        if found is not None and self._growth is None:
            logger.warning("%s", found)
        self._growth = found or self._growth

    def _explain(self, error: torch.OutOfMemoryError) -> OutOfMemoryError:
        from esm_efficient.estimation.advice import explain_out_of_memory

        phase = self._phase
        if phase == "between":
            phase = "optimizer" if self._gradients_wait else "data"
        return explain_out_of_memory(
            error,
            phase=phase,
            held=self._now_held(),
            model=self.model,
            optimizer=self.optimizer,
            batch=self.batch,
            accumulation=self._accumulation,
            dtype=self._dtype,
            memory=torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0,
        )


def _outputs(output: Any) -> Iterator[Tensor]:
    """The tensors that a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (value for value in output.values() if isinstance(value, Tensor))
    elif isinstance(output, (tuple, list)):
        yield from (value for value in output if isinstance(value, Tensor))
