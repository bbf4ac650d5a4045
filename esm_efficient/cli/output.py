"""What a command writes: its result on stdout, notes on stderr, and nothing of other libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from esm_efficient.errors import ConfigurationError, nearest
from esm_efficient.published import check_name
from esm_efficient.reporting.tables import one_line

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no text.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show all logs and warnings.")]

typed_parameters: ContextVar[Sequence[Any]] = ContextVar("typed_parameters", default=())
"""The parameters of the command that runs."""

typed_line: ContextVar[str | None] = ContextVar("typed_line", default=None)
"""The command line that runs, which a page repeats."""

_OR_NONE = ("split", "partition", "clusters")
"""The options of a column that may be ``none``."""
_OTHER_NAMES = {"epochs": ("num_train_epochs",), "resume": ("resume_from_checkpoint",), "output": ("output_dir",)}
"""What the functions of the library call the parameter of a command."""

_VALUE = r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\([^)]*\)|[^\s,:;()]+?(?=[,:;()]|\.?(?:\s|$)))"""


def is_first_rank() -> bool:
    """Return whether this process is the one of a run on several ranks that prints and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"  # torchrun and accelerate launch set it


def without_codes(text: str) -> str:
    """Return a text with its lines as they are, and other control characters as codes that a terminal does not run."""
    return "\n".join(map(one_line, text.split("\n")))


def show(result: Any, as_json: bool) -> None:
    """Print a result, on the first rank alone, as text or everything that it knows as one JSON object.

    A text names the options of the command where the library names its parameters.
    """
    if not is_first_rank():
        return
    if not as_json:
        typer.echo(without_codes(as_typed(str(result), typed_parameters.get())))
        return
    record = result if isinstance(result, Mapping) else getattr(result, "to_dict", lambda: dataclasses.asdict(result))()
    typer.echo(json.dumps(_plain(record), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return a value for JSON: an undefined number is null, and a path is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def quiet(*, verbose: bool = False) -> Iterator[None]:
    """Keep the notes of other libraries from the user in a ``with`` block, and stdout for the result.

    The warnings of this library are one line each, from the first rank alone. With `verbose`, all logs and warnings are
    shown.
    """
    own = logging.getLogger("esm_efficient")
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s" if verbose else "%(levelname)s: %(message)s"))
    handler.addFilter(_as_a_line)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        stack.callback(own.setLevel, own.level)
        stack.callback(own.removeHandler, handler)
        own.addHandler(handler)
        own.setLevel(logging.INFO if verbose else logging.WARNING if is_first_rank() else logging.ERROR)
        if not verbose:
            stack.enter_context(_silent_libraries())
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="esm_efficient")
            warnings.showwarning = _show_warning
        yield


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    if is_first_rank():
        sys.stderr.write(f"warning: {without_codes(as_typed(str(message), typed_parameters.get()))}\n")


def _as_a_line(record: logging.LogRecord) -> bool:
    """Write a message of this library as the command line says it."""
    record.levelname = record.levelname.lower()
    record.msg, record.args = without_codes(as_typed(record.getMessage(), typed_parameters.get())), ()
    return True


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    quantizer = logging.getLogger("bitsandbytes")  # it speaks when peft imports it, whether it is used or not
    level = quantizer.level
    before, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    quantizer.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if hidden := not sys.stderr.isatty() and not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        quantizer.setLevel(level)
        transformers_logging.set_verbosity(before)
        if had_bar:
            transformers_logging.enable_progress_bar()
        if hidden:
            datasets.enable_progress_bars()


def as_typed(message: str, parameters: Sequence[Any]) -> str:
    """Return a message of the library with the options of a command in place of the parameters of a function.

    Args:
        message: such as ``keep='start' reads a part``.
        parameters: the parameters of the command.

    Example:
        >>> from esm_efficient.cli import parameters_of
        >>> as_typed('12 sequences are too long: keep="start" reads a part', parameters_of(["predict"]))
        '12 sequences are too long: --keep start reads a part'
    """
    message = re.sub(r'data_options=\{"(\w+)": \.\.\.\}', r"\1=", message)  # a command has no data_options
    for parameter in parameters:
        option = next((name for name in parameter.opts if name.startswith("--")), None)
        if option is None:
            continue
        nothing = f"{option} none" if parameter.name in _OR_NONE else f"no {option}"
        off = next(iter(parameter.secondary_opts), nothing)

        def typed(match: re.Match[str], on: str = option, off: str = off) -> str:
            if match[1] in ('""', "''"):
                return f'{on} ""'
            value = (match[1] or "").strip("\"'")
            if re.fullmatch(r"\[\d+(, \d+)*\]", value):
                value = value[1:-1].replace(" ", "")
            return {"True": on, "False": off, "": on, "None": f"{on} none"}.get(value, f"{on} {value}")

        for name in (parameter.name, *_OTHER_NAMES.get(parameter.name, ())):
            message = re.sub(rf"\b(?<![-\w.]){name}=({_VALUE})?", typed, message)
    return message


def writable_folder(path: Path | None) -> Path | None:
    """Return a folder that can be written to, which need not exist yet.

    Raises:
        BadParameter: it is a file, or it cannot be created.
    """
    if path is None:
        return None
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file: expected a folder to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"no file can be written into {there}: expected a folder to write to")
    return path


def writable_page(path: Path | None) -> Path | None:
    """Return the path of an HTML page that can be written.

    Raises:
        BadParameter: it does not end with .html, or its folder does not exist or cannot be written to.
    """
    if path is None:
        return None
    if path.suffix != ".html":
        raise typer.BadParameter(f"{path}: expected a file that ends with .html")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise typer.BadParameter(f"{path}: its folder does not exist, or no file can be written there")
    return path


def existing_file(path: str, names: tuple[str, ...] = ("demo", "deeploc")) -> None:
    """Refuse a path of a file that does not exist; `names` are the words that the command reads in place of a path.

    Raises:
        BadParameter: there is no such file.
    """
    if path in names:
        return
    if Path(path).is_dir():
        raise typer.BadParameter(f"{path} is a folder: expected a file of sequences")
    if Path(path).exists() and not Path(path).is_file():
        raise typer.BadParameter(f"{path} is a pipe or a device: expected a file, because it is read twice")
    if not Path(path).is_file():
        folder = Path(path).parent
        there = [str(folder / each.name) for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
        raise typer.BadParameter(f"no file at {path}{nearest(path, [*there, *names])}")


def known_model(name: str) -> str:
    """Return the name of a model, unless there is certainly none.

    Raises:
        BadParameter: there is no such model.
    """
    return _known(name, trained=False)


def known_trained_model(name: str) -> str:
    """As `known_model`, of a model with a trained head."""
    return _known(name, trained=True)


def _known(name: str, *, trained: bool) -> str:
    try:
        return check_name(name, trained=trained)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error


MODEL_HELP = 'An ESM-2 size such as 650M, a folder or a Hub name; "demo" for a tiny model that needs no network.'

PageOption = Annotated[
    Path | None,
    typer.Option("--report", callback=writable_page, metavar="FILE", help="Write a page that ends with .html."),
]
ModelOption = Annotated[str, typer.Option("--model", callback=known_model, help=MODEL_HELP)]
ModelArgument = Annotated[
    str,
    typer.Argument(callback=known_model, help=MODEL_HELP, metavar="MODEL"),
]


class _Notes(logging.Handler):
    """Keeps what is said but is no warning, in its attribute ``texts``."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def notes_of_data() -> Iterator[list[str]]:
    """Collect what is said of a table but is no warning: what each column was read as, and what was left out."""
    notes, library = _Notes(), logging.getLogger("esm_efficient.data")
    level = library.level
    library.setLevel(logging.INFO)
    library.addHandler(notes)
    try:
        yield notes.texts
    finally:
        library.removeHandler(notes)
        library.setLevel(level)
