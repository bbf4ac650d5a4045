"""ProfilerCallback: the profiler around a transformers Trainer."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esm_efficient.errors import ConfigurationError
from esm_efficient.profiling.profiler import Profiler
from esm_efficient.profiling.report import ProfileReport, RankReports

if TYPE_CHECKING:
    from transformers import Trainer

METRIC_DEFINITIONS: tuple[dict[str, str], ...] = (
    {"Name": "epoch", "Regex": r"'epoch': '?([0-9.]+)"},
    {"Name": "max_gpu_mem", "Regex": r"Max GPU memory use during training: ([0-9.e+-]+) MB"},
    {"Name": "train_loss", "Regex": r"'loss': '?([0-9.e+-]+)"},
    {"Name": "train_samples_per_second", "Regex": r"'train_samples_per_second': '?([0-9.e+-]+)"},
    {"Name": "eval_loss", "Regex": r"'eval_loss': '?([0-9.e+-]+)"},
    {"Name": "eval_accuracy", "Regex": r"'eval_accuracy': '?([0-9.e+-]+)"},
)
"""Six metrics of a training log, by name and pattern, as SageMaker's metric definitions take them.

They are those of the AWS tutorial "Efficiently fine-tune the ESM-2 protein language model with Amazon SageMaker", but
for the quote before a number: transformers 5 logs ``'loss': '0.69'`` where version 4 logged ``'loss': 0.69``, and the
tutorial's own patterns then match nothing.
"""


class ProfilerCallback(TrainerCallback):
    """Profiles every run of a transformers Trainer: memory and time by phase, throughput, growth.

    The figures are logged through the Trainer, so that any tracker gets them, every ``logging_steps`` and at the end,
    under names that begin with ``profile/``. The end prints ``Max GPU memory use during training: <x> MB``, the line
    that the tutorial's SageMaker job is watched for; x is what the driver says is in use, in MiB, and 0 without a GPU.
    When memory runs out, ``trainer.train()`` raises an error that says what was held and what would fit.

    Args:
        trainer: the Trainer to profile, which the callback adds itself to: there is nothing else to do.
        warmup_steps: optimizer steps that no rate includes.
        compare_with_matmul: measure the device's rate of matrix products at the end of the warm-up.
        every: as `Profiler`.

    Attributes:
        report: figures of this rank; None before the first run.
        reports: figures of every rank; None before the end of the first run.

    Raises:
        ConfigurationError: the Trainer is profiled already, or from within ``trainer.train()`` under torch's
            DataParallel.
        OutOfMemoryError: from within ``trainer.train()``.

    Example:
        >>> profiler = ProfilerCallback(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(profiler.report)  # doctest: +SKIP
    """

    def __init__(
        self, trainer: Trainer, *, warmup_steps: int = 2, compare_with_matmul: bool = True, every: int = 10
    ) -> None:
        if any(isinstance(callback, ProfilerCallback) for callback in trainer.callback_handler.callbacks):
            raise ConfigurationError("this Trainer has a ProfilerCallback already")
        self.report: ProfileReport | None = None
        self.reports: RankReports | None = None
        self._trainer = trainer
        self._make_profiler = functools.partial(
            Profiler, warmup_steps=warmup_steps, compare_with_matmul=compare_with_matmul, every=every
        )
        self._profiler: Profiler | None = None
        # A callback is not told of errors, and the profiler must end with the run however it ends.
        trainer.train = self._guard(trainer.train)  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        if args.n_gpu > 1:
            raise ConfigurationError(
                f"this process drives {args.n_gpu} GPUs (torch's DataParallel), which cannot be told apart: start one "
                "process a GPU with torchrun, or name one in CUDA_VISIBLE_DEVICES"
            )
        if self._profiler is not None:  # a run that auto_find_batch_size gave up and starts again
            self._profiler.__exit__(None, None, None)
        self._profiler = self._make_profiler(
            kwargs["model"], kwargs["optimizer"], accumulation=args.gradient_accumulation_steps
        )
        self._profiler.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; log at the Trainer's own intervals."""
        if self._profiler is None:
            return
        self._profiler.step()
        if control.should_log and not control.should_training_stop:
            self._trainer.log(self._profiler.report().metrics())
            control.should_log = self._trainer.control.should_log = True  # the Trainer's own figures are still to come

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, gather and log."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self.reports = _gather(profiler.report())
        self.report = self.reports.reports[args.process_index if len(self.reports.reports) > 1 else 0]
        self._trainer.log(self.reports.metrics())
        if state.is_world_process_zero:
            used = sum(report.driver_bytes or 0 for report in self.reports.reports if report.device.startswith("cuda"))
            # Whoever watches a job reads its output.
            print(f"Max GPU memory use during training: {used // 2**20} MB", flush=True)  # noqa: T201

    def _guard(self, train: Any) -> Any:
        @functools.wraps(train)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            except BaseException as error:
                profiler, self._profiler = self._profiler, None
                if profiler is not None:
                    profiler.__exit__(type(error), error, error.__traceback__)
                raise

        return guarded


def _gather(report: ProfileReport) -> RankReports:
    """The reports of all ranks, in order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return RankReports((report,))
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, dataclasses.replace(report, rank=rank, ranks=world))
    return RankReports(tuple(gathered))
