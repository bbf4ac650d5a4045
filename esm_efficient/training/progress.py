"""What a run shows while it trains: one bar in a terminal, and one line per report elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from esm_efficient.costs.memory import resident_peak
from esm_efficient.reporting import format_bytes
from esm_efficient.reporting.tables import format_duration

_METRICS = {"eval_mcc": "MCC", "eval_f1_macro": "F1", "eval_spearman": "Spearman"}


def show_progress(trainer: Any) -> None:
    """Replace the bar and the lines of a Trainer: by one bar in a terminal, and by readable lines elsewhere.

    With ``disable_tqdm=True`` and in a notebook, what the Trainer shows stays. With ``disable_tqdm=True`` and
    ``logging_strategy="no"`` it shows nothing.

    Args:
        trainer: a `WeightedTrainer`.
    """
    if trainer.args.disable_tqdm and trainer.args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)  # it would print the summary of the run
    elif any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RunBar(trainer) if sys.stderr.isatty() else RunLines(trainer))


class _Progress(TrainerCallback):
    """Collects the newest loss, speed, memory and metric of a run.

    Args:
        trainer: a `WeightedTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.start = (0.0, 0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.start = (time.perf_counter(), state.global_step, self.trainer.residues_trained)

    def figures(self, logs: Mapping[str, Any]) -> dict[str, str]:
        """Return the values of a report, by name."""
        shown = {}
        if "loss" in logs:
            shown["loss"] = f"{float(logs['loss']):.3f}"
            seconds, residues = time.perf_counter() - self.start[0], self.trainer.residues_trained - self.start[2]
            if residues:  # batches of pooled states have no masks to count in
                shown["residues/s"] = f"{residues / seconds:,.0f}"
        shown |= {name: f"{logs[key]:.3f}" for key, name in _METRICS.items() if key in logs}
        on_gpu = self.trainer.args.device.type == "cuda"
        shown["memory"] = format_bytes(torch.cuda.max_memory_allocated() if on_gpu else resident_peak())
        return shown


class RunBar(_Progress):
    """Shows a run as one bar of a terminal, with the time left and the newest values."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control)
        other_rank = not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=other_rank
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest values."""
        self.shown |= self.figures(logs or {})
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()


class RunLines(_Progress):
    """Writes a line to the standard error for each report of a run, for the log of a job."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; before and after training, evaluations are not reported."""
        super().on_train_begin(args, state, control)
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop reporting."""
        self.training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the line, from the first process alone."""
        logs = logs or {}
        named = "loss" in logs or any(key in logs for key in _METRICS)
        done = state.global_step - self.start[1]
        if not (self.training and named and done):
            return  # the summary at the end has neither a loss nor a metric
        figures = self.figures(logs).items()  # on every rank, because they add up their residues
        if not state.is_world_process_zero:
            return
        where = "" if "loss" in logs else "validation: "
        values = ", ".join(f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in figures)
        left = (time.perf_counter() - self.start[0]) / done * (state.max_steps - state.global_step)
        end = f", {format_duration(left)} left" if left else ""
        tqdm.write(f"step {state.global_step:,} of {state.max_steps:,}: {where}{values}{end}", file=sys.stderr)
