"""Scripts in copies of processes that have loaded the libraries; a new process takes seconds to load them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState

_LIBRARIES = ("sagemaker.train", "sagemaker.core.training.configs", "esm_efficient.training.finetune")


class Copy:
    """A script that runs in a copy of this process.

    Args:
        script: path of a script, or its text.
        arguments: what follows the script in its command line.
        folder: folder for what the script prints.
        cwd: folder in which the script runs.
        before: called in the copy before the script runs.
    """

    def __init__(
        self,
        script: Path | str,
        *arguments: object,
        folder: Path,
        cwd: Path | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.arguments = folder, [str(argument) for argument in arguments]
        run = functools.partial(_run, script, self.arguments, folder, cwd or folder, before)
        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """End the copy at once, as kill -9 does."""
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for the end of the script; return its exit status and what it has printed."""
        self.process.join(timeout)
        if self.is_running:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, error = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, error)


class ServedCopy(Copy):
    """A script that runs in a copy of a server, which has loaded the libraries and has no threads.

    This process may have threads. The arguments are as of `Copy`; the script shows no warnings.
    """

    def __init__(self, script: Path, *arguments: object, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.arguments = folder, [str(argument) for argument in arguments]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_LIBRARIES))
        become = functools.partial(_set_environment, os.environ | environment)
        self.process = context.Process(target=_run, args=(script, self.arguments, folder, Path.cwd(), become))
        with mock.patch.dict(os.environ, environment):  # the first copy starts the server
            self.process.start()


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")


def _run(
    script: Path | str, arguments: Sequence[str], folder: Path, cwd: Path, before: Callable[[], object]
) -> NoReturn:
    """Run a script in this process, and end it without the exit handlers of the tests."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = (folder / name).open("w")
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    os.chdir(cwd)
    sys.argv = [str(script) if isinstance(script, Path) else "-c", *arguments]
    before()  # while there is one thread, as some system calls need
    torch.set_num_threads(1)  # a copy has none of the threads of its original
    status: object = 0
    try:
        if isinstance(script, Path):
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        else:
            exec(textwrap.dedent(script), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_on_ranks(script: Path, *arguments: object, ranks: int, folder: Path, timeout: float = 400) -> None:
    """Run a script on several ranks, as torchrun does, and wait for them.

    Args:
        script: path of the script.
        arguments: its arguments.
        ranks: number of ranks.
        folder: folder for what each rank prints.
        timeout: seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> Copy:
        def become_rank() -> None:
            AcceleratorState._reset_state()
            PartialState._reset_state()
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in (numbers | address).items()}

        printed = folder / f"printed{rank}"
        printed.mkdir(exist_ok=True)
        return Copy(script, *arguments, folder=printed, before=become_rank)

    copies = [start(rank) for rank in range(ranks)]
    end = time.monotonic() + timeout
    # If one fails, the others would wait for it.
    while any(copy.is_running for copy in copies) and time.monotonic() < end:
        if any(not copy.is_running and copy.process.exitcode for copy in copies):
            break
        time.sleep(0.05)
    failed = [copy for copy in copies if not copy.is_running and copy.process.exitcode]
    for copy in copies:
        copy.kill()
    for copy in failed or copies:
        done = copy.wait()
        assert done.returncode == 0, done.stderr[-3000:]
