"""The command line: each command calls one public function and prints its result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import typer

from esm_efficient.cli import comparing as comparing
from esm_efficient.cli import jobs as jobs
from esm_efficient.cli import models as models
from esm_efficient.cli import training as training
from esm_efficient.cli.commands import app, command_group
from esm_efficient.cli.output import as_typed, typed_line, typed_parameters, without_codes
from esm_efficient.errors import EsmEfficientError, TrainingInterrupted

_ORDER = ("data", "probe", "finetune", "evaluate", "predict", "embed", "report", "export")
"""The commands in the order in which a user needs them; those that estimate follow."""

_PLACES = {name: place for place, name in enumerate(_ORDER)}
app.registered_commands.sort(key=lambda command: _PLACES.get(getattr(command.callback, "__name__", ""), len(_ORDER)))

__all__ = ["app", "main", "parameters_of"]

INTERRUPTED = 130
"""The exit status of a run that was stopped by a signal, as shells give it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        arguments: arguments without the program's name; None for those of the process. None at all give the help.

    Returns:
        0 if the command succeeded, 1 after an error of the library, 2 if the arguments are invalid, 130 if it was
        stopped. An error is one line on stderr.
    """
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only this subclass of its UsageError
    args = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    typed_parameters.set(parameters_of(args))
    typed_line.set(shlex.join(["esm-efficient", *args]))
    try:
        status = command_group().main(args, prog_name="esm-efficient", standalone_mode=False) or 0
        _leave_ranks()
        return status
    except usage_error as error:
        status, message = 2, getattr(error, "format_message", error.__str__)()
        message += _what_was_given(error, message) + _what_comes_last(error)
    except (TrainingInterrupted, typer.Abort, KeyboardInterrupt) as error:
        status, message = INTERRUPTED, str(error) or "stopped"
        if isinstance(error, TrainingInterrupted):
            _leave_ranks()
    except (EsmEfficientError, OSError) as error:
        status, message = 1, str(error).partition("\n\n")[0]  # a table may follow, for Python
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
            raise
        status, message = 1, f"the device has too little free memory. Use a smaller model. torch said: {error}"
    line = " ".join(as_typed(message, typed_parameters.get()).split())
    sys.stderr.write(f"error: {without_codes(line)}\n")
    return status


def _leave_ranks() -> None:
    """Destroy the process group, if there is one, at an end that all ranks reach.

    A process that ends with a group of gloo is sometimes aborted (SIGABRT) by a thread of the group.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _what_was_given(error: Any, message: str) -> str:
    """Return what to add to pydantic's error for a value of another type: it does not repeat the value."""
    details: list[Any] = getattr(error.__cause__, "errors", list)()
    given = repr(details[0].get("input")) if details else ""
    return "" if given in message else f" (given: {given})"


def _what_comes_last(error: Any) -> str:
    """Return what to add to the error for a missing argument of several words: the last word was taken for another."""
    parameter = getattr(error, "param", None)
    if type(error).__name__ != "MissingParameter" or getattr(parameter, "nargs", 1) != -1:
        return ""
    names = [name.metavar for name in error.ctx.command.params if name.param_type_name == "argument"]
    return f" Expected {' '.join(names)}: the last word is taken as {names[-1]}, so one of the two is missing"


def parameters_of(arguments: Sequence[str]) -> list[Any]:
    """Return the parameters of the command that is called; none if there is no such command."""
    known = command_group().commands
    command = next((known[name] for name in arguments if name in known), None)
    return [] if command is None else list(command.params)
