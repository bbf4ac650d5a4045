"""Checkpoints of runs that are interrupted: written on a signal, and checked before they are used."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from esm_efficient.compat import guard_training, running_trainer
from esm_efficient.data.download import sha256_of
from esm_efficient.errors import CheckpointError, ConfigurationError, TrainingInterrupted, listing

logger = logging.getLogger(__name__)

MANIFEST = "files.json"
"""The file of a checkpoint that lists size and hash of its files, and describes its run."""

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class CheckpointCallback(TrainerCallback):
    """List the files of every checkpoint after it is written; on a signal, write a checkpoint and end the run.

    A machine sends a signal shortly before it is reclaimed. The callback then lets the current optimizer step finish
    and writes a checkpoint, and `TrainingInterrupted` is raised. All ranks stop after the same step, whichever rank got
    the signal. A run that resumes from `last_checkpoint` has the same result as one that was not interrupted.

    With ``save_total_limit``, older checkpoints are deleted after the new one is whole. A full disk therefore needs
    room for one checkpoint more.

    Args:
        signals: signals that end the run. They are handled during training, in the main thread.

    Raises:
        TrainingInterrupted: from within training; a signal was received.
        CheckpointError: from within training; a checkpoint could not be written.
        ConfigurationError: it is used outside of ``trainer.train()``.

    Example:
        >>> finetune(model, data, callbacks=[CheckpointCallback()], save_strategy="steps")  # doctest: +SKIP
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self.run: dict[str, Any] | None = None
        self._limit: int | None = None
        self._strategy: SaveStrategy | str | None = None
        self._before: dict[signal.Signals, Any] | None = None
        self._remove_guard: Callable[[], None] | None = None
        # A signal may come after the ranks have agreed to continue: what this rank received is stored separately.
        self._received = self._agreed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the run; the signals are handled from its first evaluation or epoch."""
        trainer: Any = running_trainer()
        if trainer is None or state.is_hyper_param_search:  # a search has a folder per trial, which no callback is told
            raise ConfigurationError("CheckpointCallback works in trainer.train() only, and not in a search")
        self._end(args)
        self._received = self._agreed = False
        self._limit, self._strategy = args.save_total_limit, None

        @contextmanager
        def guard() -> Iterator[None]:
            # Trainer deletes older checkpoints before on_save, that is before the new one is known to be whole. Not
            # earlier: an error of another callback's on_train_begin is not seen here.
            args.save_total_limit = None
            self._handle_signals()
            try:
                with explain_full_disk(Path(args.output_dir or "."), trainer.state):
                    yield
            except BaseException:
                self._end(args)
                raise

        self._remove_guard = guard_training(trainer, guard)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the previous signal handlers."""
        self._end(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if a rank has received a signal."""
        if self._any_rank_received(args.device):
            logger.warning("a signal was received: the run ends after step %d", state.global_step)
            self._agreed = control.should_save = control.should_training_stop = True
            # The run that resumes begins with the next epoch: what belongs to the end of this one is done now.
            epoch = state.epoch or 0
            if epoch >= 1 - 1e-6 and abs(round(epoch) - epoch) < 1e-6:
                control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
                control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            # With "best", Trainer would save only if this step's evaluation is the best.
            self._strategy, args.save_strategy = args.save_strategy, SaveStrategy.STEPS

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the checkpoint's files, then delete older checkpoints; end the run if a signal was received.

        Raises:
            TrainingInterrupted: a signal was received.
        """
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if args.should_save:
            _write_manifest(folder, self.run)
            _delete_older(folder, state.best_model_checkpoint, self._limit)
        if self._agreed:
            PartialState().wait_for_everyone()
            raise TrainingInterrupted(
                f"a signal ended the run after optimizer step {state.global_step} of {state.max_steps}: resume it from "
                f"{folder}"
            )

    def _handle_signals(self) -> None:
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _end(self, args: TrainingArguments) -> None:
        """Undo what `on_train_begin` and the first epoch set, once."""
        if self._remove_guard is None:
            return
        self._remove_guard()
        self._remove_guard = None
        args.save_total_limit = self._limit
        args.save_strategy = self._strategy or args.save_strategy
        for number, handler in (self._before or {}).items():
            # A handler that was not installed from Python is None, and cannot be installed again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = None

    def _any_rank_received(self, device: torch.device) -> bool:
        if PartialState().num_processes == 1:
            return self._received
        received = torch.tensor(float(self._received), device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint that a `CheckpointCallback` wrote.

    Args:
        folder: the ``output_dir`` of the run; it may be missing.

    Returns:
        The checkpoint's folder, for ``resume_from_checkpoint``; None if there is none. A checkpoint is skipped with a
        warning if it is incomplete, because its run was killed or its copy was interrupted, or if a file has another
        content than was written.

    Example:
        >>> print(last_checkpoint("a-folder-without-checkpoints"))
        None
    """
    for path in numbered_checkpoints(folder):
        faults = find_faults(path, needs_optimizer=False) if (path / MANIFEST).is_file() else [f"{MANIFEST} is missing"]
        if not faults:
            return path
        logger.warning("%s is incomplete or damaged and is skipped: %s", path, listing(faults))
    return None


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` of a run, the newest step first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and _step_of(path) >= 0]
    return sorted(paths, key=_step_of, reverse=True)


def find_faults(path: Path, *, needs_optimizer: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint's files: by its list of hashes, else by their formats' own checks.

    Args:
        path: the checkpoint's folder.
        needs_optimizer: whether a checkpoint must have an ``optimizer.pt`` and a ``scheduler.pt``, without which a run
            would go on at another rate.
    """
    needed = ["optimizer.pt", "scheduler.pt"] if needs_optimizer else []
    faults = [f"{name} is missing, as with save_only_model=True" for name in needed if not (path / name).is_file()]
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest is None:
            return [f"{MANIFEST} is not a list of files with hashes"]
        listed = manifest["files"].items()
        changed = [fault for name, entry in listed if (fault := _compare(path / name, entry))]
        return changed + ([] if changed else faults)
    faults += [] if (path / "trainer_state.json").is_file() else ["trainer_state.json is missing"]
    for file in sorted(path.iterdir()):
        try:
            if file.name == "trainer_state.json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(file) as archive:
                    if broken := archive.testzip():
                        faults.append(f"{file.name} is damaged at {broken}")
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            faults.append(f"{file.name} is damaged ({error})")
    return faults


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's list of files and the description of its run; None if it has no whole list."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return None
    are_listed = all(isinstance(listed, dict) and {"bytes", "sha256"} <= listed.keys() for listed in files.values())
    return manifest if are_listed else None


@contextmanager
def explain_full_disk(output_dir: Path, state: TrainerState | None = None) -> Iterator[None]:
    """Replace the error of a file that could not be written by one that says what is full and what is good.

    Args:
        output_dir: the folder that is written to.
        state: the state of the run, to delete the checkpoint of its step if it is incomplete; None outside a run.

    Raises:
        CheckpointError: a file could not be written.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (reason := _why_unwritten(error)):
            raise
        usage = shutil.disk_usage(output_dir if output_dir.is_dir() else output_dir.absolute().parent)
        message = (
            f"a file in {output_dir} could not be written: {reason} ({usage.free / 1e6:,.1f} of "
            f"{usage.total / 1e6:,.1f} MB are free)."
        )
        if state is not None:
            incomplete = output_dir / f"checkpoint-{state.global_step}"
            if incomplete.is_dir() and find_faults(incomplete):
                shutil.rmtree(incomplete, ignore_errors=True)
                message += f" The incomplete {incomplete.name} was deleted."
        good = last_checkpoint(output_dir)
        message += " No checkpoint is whole." if good is None else f" The last whole checkpoint is {good}."
        raise CheckpointError(
            f"{message} Free some space, or write less (save_total_limit=1 keeps one checkpoint, and needs room for "
            "two), and start the run again" + ("" if good is None else " from that checkpoint")
        ) from error


def _why_unwritten(error: BaseException) -> str:
    """Return why a file could not be written; empty for an error of another kind."""
    if isinstance(error, OSError):
        return _FULL.get(error.errno or 0, "")
    text = str(error)
    if isinstance(error, SafetensorError):  # "I/O error: No space left on device (os error 28)"
        code = re.search(r"os error (\d+)", text)
        return _FULL.get(int(code[1]), "") if code else ""
    # torch tells no cause: "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    is_writer = "unexpected pos" in text or "PytorchStreamWriter" in text
    return "the disk is full, or a limit is reached" if is_writer else ""


def _write_manifest(folder: Path, run: dict[str, Any] | None) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    # Renaming is atomic: a run that is killed here leaves no half of a list.
    unfinished = folder.parent / f".{folder.name}-{MANIFEST}"
    unfinished.write_text(json.dumps({"run": run, "files": files}, indent=2) + "\n")
    os.replace(unfinished, folder / MANIFEST)


def _compare(path: Path, listed: Any) -> str:
    """Return how a file differs from what the manifest lists; empty if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{path.name} has {path.stat().st_size:,} bytes instead of {listed['bytes']:,}"
    try:
        same = sha256_of(path) == listed["sha256"]
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if same else f"{path.name} has other content than was written"


def _delete_older(newest: Path, best: str | None, limit: int | None) -> None:
    """Delete all but `limit` checkpoints; the newest and the best stay.

    A checkpoint of a later step than the newest is left from a run that was resumed before it. It is deleted first.
    """
    if not limit or limit < 0:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    others = [path for path in numbered_checkpoints(newest.parent) if path.resolve() not in kept]
    others.sort(key=lambda path: (_step_of(path) < _step_of(newest), _step_of(path)), reverse=True)
    for path in others[max(limit - len(kept), 0) :]:
        shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
