"""Checkpoints that a killed run can rely on: known to be whole, and written when the machine is about to go."""

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
    """Lists the files of every checkpoint once it is written, and on a signal writes one and ends the run.

    A machine that is reclaimed sends a signal and goes soon after. The optimizer step that is under way is finished,
    the checkpoint is written, and `TrainingInterrupted` is raised. The ranks agree on the step, whichever of them got
    the signal. Go on from `last_checkpoint`: the run ends where it would have ended.

    Args:
        signals: to end on. They are listened to while training, in the main thread; others are not touched.

    Example:
        >>> finetune(model, data, callbacks=[CheckpointCallback()], save_strategy="steps")  # doctest: +SKIP
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self._before: dict[signal.Signals, Any] = {}
        # What this rank heard, and what all ranks have agreed on, are two things: a signal may come in between.
        self._heard = self._agreed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen."""
        self._heard = self._agreed = False
        self._before = {number: signal.signal(number, self._hear) for number in self.signals}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no more."""
        self._restore()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint if a rank has heard the signal."""
        if self._anybody_heard(args.device):
            logger.warning("ending after step %d: a signal asked for it", state.global_step)
            self._agreed = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the files; end the run if that was asked for.

        Raises:
            TrainingInterrupted: a signal has ended the run.
        """
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
        if self._agreed:
            PartialState().wait_for_everyone()
            self._restore()
            raise TrainingInterrupted(
                f"a signal ended the run after optimizer step {state.global_step} of {state.max_steps}; {folder} has "
                "everything to go on from"
            )

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _anybody_heard(self, device: torch.device) -> bool:
        if PartialState().num_processes == 1:
            return self._heard
        heard = torch.tensor(float(self._heard), device=device)
        torch.distributed.all_reduce(heard, op=torch.distributed.ReduceOp.MAX)
        return bool(heard)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint with all of its files, of those that a `CheckpointCallback` has listed.

    Args:
        folder: the ``output_dir`` of the run; it need not exist.

    Returns:
        Its folder, for ``resume_from_checkpoint``; None if there is none. One that is cut off, because its run was
        killed or it was not copied whole, is passed over with a warning.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            sizes = json.loads((path / _MANIFEST).read_text())
        except (OSError, ValueError):
            sizes = None
        if sizes and all((path / name).is_file() and (path / name).stat().st_size == n for name, n in sizes.items()):
            return path
        logger.warning("%s is not whole, and is passed over", path)
    return None
