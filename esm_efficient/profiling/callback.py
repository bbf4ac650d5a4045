"""ProfilerCallback: profile the runs of a transformers Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esm_efficient.compat import guard_training, running_trainer
from esm_efficient.errors import ConfigurationError
from esm_efficient.profiling.profiler import Profiler
from esm_efficient.profiling.report import ProfileReport, RankReports


class ProfilerCallback(TrainerCallback):
    """Profiles every run of a transformers Trainer: memory and time by phase, throughput, growth.

    The figures are logged through the Trainer, every ``logging_steps`` and at the end, so that every tracker gets them.
    Their names begin with ``profile/``. When memory runs out, ``trainer.train()`` raises an error that says what filled
    the memory and what would fit.

    Args:
        warmup_steps: optimizer steps that no rate includes.
        compare_with_matmul: measure the device's rate of matrix products at the end of the warm-up.
        every: number of optimizer steps from one detailed look at memory to the next, as in `Profiler`.

    Attributes:
        report: figures of this rank; None before the end of the first run.
        reports: figures of every rank; None before the end of the first run.

    Raises:
        ConfigurationError: from ``trainer.train()``, if the Trainer has two of these callbacks or runs under torch's
            DataParallel.
        OutOfMemoryError: from ``trainer.train()``. With ``auto_find_batch_size`` torch's own error is raised, because
            the Trainer then tries a smaller batch.

    Example:
        >>> profiler = ProfilerCallback()
        >>> trainer = Trainer(..., callbacks=[profiler])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(profiler.report)  # doctest: +SKIP
    """

    def __init__(self, *, warmup_steps: int = 2, compare_with_matmul: bool = True, every: int = 10) -> None:
        self.report: ProfileReport | None = None
        self.reports: RankReports | None = None
        self._make_profiler = partial(
            Profiler, warmup_steps=warmup_steps, compare_with_matmul=compare_with_matmul, every=every
        )
        self._run: _Run | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the profiler; it starts with the first evaluation or epoch."""
        trainer = running_trainer()
        if trainer is None:
            raise ConfigurationError("ProfilerCallback works in trainer.train() only: use Profiler for other loops")
        if sum(isinstance(callback, ProfilerCallback) for callback in trainer.callback_handler.callbacks) > 1:
            raise ConfigurationError("this Trainer has more than one ProfilerCallback: remove all but one")
        if args.n_gpu > 1:
            raise ConfigurationError(
                f"this process uses {args.n_gpu} GPUs (torch's DataParallel), which cannot be told apart: start one "
                "process per GPU with torchrun, or select one GPU with CUDA_VISIBLE_DEVICES"
            )
        if self._run is not None:
            self._run.end()
        accumulation = args.gradient_accumulation_steps
        self._run = _Run(trainer, self._make_profiler(kwargs["model"], kwargs["optimizer"], accumulation=accumulation))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; log at the Trainer's own intervals."""
        if self._run is None:
            return
        self._run.profiler.step()
        if control.should_log and not control.should_training_stop:
            self._run.trainer.log(self._run.profiler.report().metrics())
            # Logging clears the request to log; the Trainer's own figures are still to be logged.
            control.should_log = self._run.trainer.control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, gather the figures of all ranks and log them."""
        if self._run is None:
            return
        run, self._run = self._run, None
        run.end()
        gathered = gather_object([run.profiler.report()])
        reports = [dataclasses.replace(report, rank=rank, ranks=len(gathered)) for rank, report in enumerate(gathered)]
        self.report, self.reports = reports[args.process_index], RankReports(reports)
        run.trainer.log(self.reports.metrics())


class _Run:
    """One call of ``trainer.train()``; it ends the profiler when the run fails."""

    def __init__(self, trainer: Trainer, profiler: Profiler) -> None:
        self.trainer = trainer
        self.profiler = profiler
        self._started = False
        self._exits = ExitStack()
        self._exits.callback(guard_training(trainer, self._guard))

    def end(self, error: BaseException | None = None) -> None:
        """Stop the profiler and remove the guard, once; an out-of-memory error is replaced by ours."""
        self._exits.__exit__(type(error) if error is not None else None, error, None)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        # Not earlier: an error of another callback's on_train_begin is not seen, and must leave no hooks behind.
        if not self._started:
            self._exits.enter_context(self.profiler)
            self._started = True
        try:
            yield
        except BaseException as error:
            retried = self.trainer.args.auto_find_batch_size and isinstance(error, torch.OutOfMemoryError)
            self.end(None if retried else error)
            raise
