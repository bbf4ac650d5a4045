"""The command line: each command calls one public function and prints its result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from esm_efficient.cli.commands import app
from esm_efficient.errors import EsmEfficientError

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        arguments: arguments without the program's name; None for those of the process.

    Returns:
        0 if the command succeeded, 1 after an error of the library, 2 if the arguments are invalid. An error is one
        line on stderr.
    """
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only this subclass of its UsageError
    command = typer.main.get_command(app)
    args = None if arguments is None else list(arguments)
    try:
        return command.main(args, prog_name="python -m esm_efficient", standalone_mode=False) or 0
    except usage_error as error:
        status, message = 2, getattr(error, "format_message", error.__str__)()
    except (EsmEfficientError, OSError) as error:
        status, message = 1, str(error)
    sys.stderr.write(f"error: {message}\n")
    return status
