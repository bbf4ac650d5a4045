"""Profiler: measure the costs of a training loop, phase by phase, while it runs."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from esm_efficient._torch import call_after_backward
from esm_efficient.costs.allocations import tensors_in
from esm_efficient.costs.memory import PHASES, driver_bytes, resident_peak, restart_resident_peak
from esm_efficient.errors import ConfigurationError
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.profiling.backends import make_backend
from esm_efficient.profiling.clock import PhaseClock
from esm_efficient.profiling.growth import GrowthWatch
from esm_efficient.profiling.phases import PassStage, PhaseTracker, Stage
from esm_efficient.profiling.report import PhaseFigures, ProfileReport
from esm_efficient.profiling.throughput import ThroughputMeter


class Profiler:
    """Measures memory and throughput of a training loop by phase; a context manager around the loop.

    Hooks find the phases: on the model (forward, or evaluation if gradients are off), on the gradient of its output
    (backward), on the end of the backward pass, and on the optimizer. The time between an optimizer step and the next
    forward pass is the phase ``data``. No hook is left after the block.

    On CUDA, memory is read from the allocator's counters, and the profiler resets the peak at every phase. On a CPU
    every operation of a step is counted, in the warm-up and the first two steps, in every tenth step, and whenever a
    batch is larger than all counted before. What other steps leave behind is not seen: use ``every=1`` to measure a
    leak. On MPS there is no peak: memory is read when a phase begins or ends.

    Args:
        model: the model in training; its forward pass takes ``input_ids`` and ``attention_mask`` by keyword.
        optimizer: torch's, or accelerate's wrapper of one. Without it there is no optimizer phase.
        warmup_steps: optimizer steps that no rate includes. FLOPs are counted in these steps, so with 0 there is no
            ``model_flops_per_second``. With less than 2, the rates of a CPU include steps that counting slows down.
        compare_with_matmul: measure the device's rate of matrix products at the end of the warm-up.
        every: number of optimizer steps from one detailed look at memory to the next: operation by operation on a CPU,
            layer by layer on a GPU.
        accumulation: micro-batches per optimizer step, for the advice when memory runs out.

    Raises:
        ConfigurationError: the model has no parameters, `warmup_steps` is negative, `every` is below 1, `step` or
            `report` is called before the block is entered, or the block is entered while another `Profiler` runs.
        OutOfMemoryError: from the block, in place of torch's own error. It says what filled the memory and what would
            fit.

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
        if next(model.parameters(), None) is None:
            raise ConfigurationError(f"{type(model).__name__} has no parameters, so there is nothing to profile")
        if warmup_steps < 0 or every < 1:
            raise ConfigurationError(f"warmup_steps={warmup_steps}, every={every}: expected at least 0 and 1")
        inner = getattr(optimizer, "optimizer", optimizer)
        self._new_run = partial(_ProfiledRun, model, inner, warmup_steps, compare_with_matmul, every, accumulation)
        self._run: _ProfiledRun | None = None

    def __enter__(self) -> Profiler:
        """Install the hooks and start to measure."""
        if any(run.active for run in _RUNS):
            raise ConfigurationError(
                "a Profiler is running already, and two would count each other's work: use one Profiler per loop, and "
                "none around a Trainer with a ProfilerCallback or around finetune(profile=True)"
            )
        self._run = self._new_run()
        _RUNS.add(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks; replace an out-of-memory error by one that explains it."""
        run = self._started()
        run.stop(failed=error is not None)
        if isinstance(error, torch.OutOfMemoryError):
            raise run.explain(error) from error

    def step(self) -> None:
        """Tell the profiler that an optimizer step, with all that belongs to it, has ended."""
        self._started().end_step()

    def report(self) -> ProfileReport:
        """Return what was measured so far."""
        return self._started().report()

    def _started(self) -> _ProfiledRun:
        if self._run is None:
            raise ConfigurationError("this Profiler has not been started: put the loop in `with profiler:`")
        return self._run


_MIN_DETAILED_STEPS = 2
"""Steps at the beginning that are always looked at closely: the first one that has optimizer state is the second."""


@dataclass(eq=False)
class _ProfiledRun:
    """One run of a training loop, measured from the construction to `stop`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    warmup_steps: int
    compare_with_matmul: bool
    every: int
    accumulation: int

    def __post_init__(self) -> None:
        restart_resident_peak()
        self.active = True
        self._device = next(self.model.parameters()).device
        self._steps = 0
        self._resident = 0
        self._phases = PhaseTracker()
        self._growth = GrowthWatch()
        self._state_size = len(self.optimizer.state) if self.optimizer is not None else 0
        self._backend = make_backend(self.model, self._device, self._phases)
        self._backend.start(self._optimizer_state())
        self._handles: list[Any] = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]
        if self.optimizer is not None:
            self._handles += [
                self.optimizer.register_step_pre_hook(lambda *_: self._begin_stage("optimizer")),
                self.optimizer.register_step_post_hook(lambda *_: self._after_optimizer_step()),
            ]
        self._throughput = ThroughputMeter(self._phases, count_flops=self.warmup_steps > 0)
        self._clock = PhaseClock(self._device)

    def _begin_stage(self, stage: Stage) -> None:
        """End the current phase and begin a stage."""
        ended = self._phases.switch(stage)
        self._clock.lap(ended)
        self._backend.switch(ended, stage)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Not by `model.training`: from_pretrained returns a model in evaluation mode, and a loop may train it so.
        stage: PassStage = "forward" if torch.is_grad_enabled() else "evaluation"
        self._begin_stage(stage)
        if stage == "forward":
            self._throughput.begin_batch(kwargs)
        self._backend.begin_pass(stage, list(tensors_in((args, kwargs))))

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._phases.stage == "forward":
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _: self._before_backward())
        elif self._phases.stage == "evaluation":
            self._begin_stage("evaluation")  # it goes on until something else begins
            self._backend.end_evaluation()

    def _before_backward(self) -> None:
        if self._phases.stage == "forward":
            self._begin_stage("backward")
            call_after_backward(lambda: self._begin_stage("between"))

    def _after_optimizer_step(self) -> None:
        """End the optimizer stage. The first step creates the optimizer's state, and later steps keep it."""
        self._begin_stage("between")
        if self.optimizer is not None and len(self.optimizer.state) != self._state_size:
            self._state_size = len(self.optimizer.state)
            self._backend.set_optimizer_state(self._optimizer_state())

    def end_step(self) -> None:
        """End an optimizer step."""
        self._steps += 1
        self._throughput.end_batch()
        held = self._backend.end_step()
        if held is not None:
            self._growth.add(held)
        first = max(self.warmup_steps, _MIN_DETAILED_STEPS)
        self._backend.detailed = self._steps < first or self._steps % self.every == 0
        if self._steps == self.warmup_steps:
            self._throughput.end_warmup(self._device, compare_with_matmul=self.compare_with_matmul)
            self._growth.restart()
            self._backend.discard_peak()  # that of the matrix products, which belongs to no phase
            self._clock.restart()
        self._clock.seconds(wait=False)  # so that events do not pile up

    def stop(self, *, failed: bool) -> None:
        """Stop to measure and remove all hooks; the last phase counts unless an error ended it."""
        self.active = False
        if not failed:
            self._begin_stage("between")
        self._resident = resident_peak()
        self._backend.stop()
        self._throughput.stop_counting_flops()
        for handle in self._handles:
            handle.remove()

    def report(self) -> ProfileReport:
        """Return what was measured so far."""
        seconds = self._clock.seconds()
        trained = math.nan
        if self._steps > self.warmup_steps:
            trained = sum(s for phase, s in seconds.items() if phase != "evaluation") or math.nan
        peaks = self._backend.peaks
        in_use, driver = driver_bytes(self._device)
        return ProfileReport(
            device=str(self._device),
            counted=self._backend.counted,
            phases={
                phase: PhaseFigures(peaks[phase], self._backend.reserved[phase], seconds.get(phase, 0.0))
                for phase in PHASES
                if phase in peaks
            },
            peak_phase=max(peaks, key=lambda phase: peaks[phase].total, default=""),
            steps=self._steps,
            warmup_steps=self.warmup_steps,
            **self._throughput.rates(trained),
            driver_bytes=in_use,
            driver=driver,
            resident_bytes=resident_peak() if self.active else self._resident,
            growth=self._growth.growth,
        )

    def explain(self, error: torch.OutOfMemoryError) -> OutOfMemoryError:
        """Return the error to raise in place of torch's."""
        # Imported here: the advice needs the estimator, which other runs do not.
        from esm_efficient.estimation.advice import explain_out_of_memory

        memory = torch.cuda.get_device_properties(self._device).total_memory if self._device.type == "cuda" else 0
        return explain_out_of_memory(
            error,
            phase=self._phases.failed_phase,
            held=self._backend.held(),
            model=self.model,
            optimizer=self.optimizer,
            batch=self._throughput.batch,
            accumulation=self.accumulation,
            dtype=self._throughput.dtype,
            memory=memory,
        )

    def _optimizer_state(self) -> list[Tensor]:
        return [] if self.optimizer is None else list(tensors_in(self.optimizer.state))


_RUNS: weakref.WeakSet[_ProfiledRun] = weakref.WeakSet()
"""The runs that exist in this process."""
