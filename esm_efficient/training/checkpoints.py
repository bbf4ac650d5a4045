"""Checkpoints of runs that are interrupted: written on a signal, and checked for completeness before they are used."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esm_efficient.errors import TrainingInterrupted

logger = logging.getLogger(__name__)

_MANIFEST = "files.json"


class CheckpointCallback(TrainerCallback):
    """List the files of every checkpoint after it is written; on a signal, write a checkpoint and end the run.

    A machine sends a signal shortly before it is reclaimed. The callback then lets the current optimizer step finish
    and writes a checkpoint, and `TrainingInterrupted` is raised. All ranks stop after the same step, whichever rank got
    the signal. A run that resumes from `last_checkpoint` has the same result as one that was not interrupted.

    Args:
        signals: signals that end the run. They are handled during training, in the main thread.

    Example:
        >>> finetune(model, data, callbacks=[CheckpointCallback()], save_strategy="steps")  # doctest: +SKIP
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self._before: dict[signal.Signals, Any] = {}
        # A signal may come after the ranks have agreed to continue: what this rank received is stored separately.
        self._received = self._agreed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the signal handlers."""
        self._received = self._agreed = False
        self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the previous signal handlers."""
        self._restore_handlers()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if a rank has received a signal."""
        if self._any_rank_received(args.device):
            logger.warning("a signal was received: the run ends after step %d", state.global_step)
            self._agreed = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the checkpoint's files; end the run if a signal was received.

        Raises:
            TrainingInterrupted: a signal was received.
        """
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
        if self._agreed:
            PartialState().wait_for_everyone()
            self._restore_handlers()
            raise TrainingInterrupted(
                f"a signal ended the run after optimizer step {state.global_step} of {state.max_steps}: resume it from "
                f"{folder}"
            )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _any_rank_received(self, device: torch.device) -> bool:
        if PartialState().num_processes == 1:
            return self._received
        received = torch.tensor(float(self._received), device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint that a `CheckpointCallback` wrote.

    Args:
        folder: the ``output_dir`` of the run; it may be missing.

    Returns:
        The checkpoint's folder, for ``resume_from_checkpoint``; None if there is none. An incomplete checkpoint,
        because its run was killed or its copy was interrupted, is skipped with a warning.
    """
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            sizes = json.loads((path / _MANIFEST).read_text())
        except (OSError, ValueError):
            sizes = None
        if sizes and all((path / name).is_file() and (path / name).stat().st_size == n for name, n in sizes.items()):
            return path
        logger.warning("%s is incomplete and is skipped", path)
    return None
