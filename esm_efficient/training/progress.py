"""One progress bar of a run, instead of the lines that a Trainer prints."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from esm_efficient.reporting import format_bytes

_METRICS = {"eval_mcc": "MCC", "eval_f1_macro": "F1", "eval_spearman": "Spearman"}


class RunProgress(TrainerCallback):
    """Shows steps, time left, loss, residues/s, memory and the newest metric on validation in one bar of a terminal.

    In a terminal, the trainer's own bars and lines are removed. Elsewhere, such as in the log of a job, its lines stay
    and there is no bar. With ``disable_tqdm=True`` and ``logging_strategy="no"`` there is neither.

    Args:
        trainer: a `WeightedTrainer`, which gets this callback.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.bar: Any = None
        self.shown: dict[str, str] = {}
        self.start = (0.0, 0)
        if trainer.args.disable_tqdm and trainer.args.logging_strategy == "no":
            trainer.remove_callback(PrinterCallback)  # it would print the summary of the run
        elif sys.stderr.isatty() and not trainer.args.disable_tqdm:
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        other_rank = not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=other_rank
        )
        self.start = (time.perf_counter(), self.trainer.residues_trained)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest values."""
        logs = logs or {}
        if "loss" in logs:
            self.shown["loss"] = f"{float(logs['loss']):.3f}"
            seconds, residues = time.perf_counter() - self.start[0], self.trainer.residues_trained - self.start[1]
            if residues:  # batches of pooled states have no masks to count in
                self.shown["residues/s"] = f"{residues / seconds:,.0f}"
        self.shown |= {name: f"{logs[key]:.3f}" for key, name in _METRICS.items() if key in logs}
        if torch.cuda.is_available():
            self.shown["memory"] = format_bytes(torch.cuda.max_memory_allocated())
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()
