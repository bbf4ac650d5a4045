"""Map a file of sequences to a file of results, in constant memory; a run that was stopped goes on where it was.

The source is read twice: first every row is checked and counted, so that a wrong row is an error before hours of work
and not after; then the rows are computed in blocks. Each block becomes a file of its own in a folder beside the output,
under a temporary name until it is whole. At the end the blocks are joined in the order of the source.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.data.download import sha256_of
from esm_efficient.data.sequences import clean, count_residues
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference.inputs import CheckedSequences
from esm_efficient.inference.rows import Row, check_rows, usable_rows
from esm_efficient.reporting import count_of
from esm_efficient.reporting.files import blocks_folder, write_tables, written_as

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

BLOCK_ROWS = 2048
"""Sequences per block: the most that are computed again after a stop."""

Compute = Callable[[list[str]], Mapping[str, Any]]
"""Returns the columns of results, as Arrow arrays, of some sequences."""


@dataclass(frozen=True)
class FileResult:
    """What a run over a file did.

    Attributes:
        output: the file of results.
        rows: rows in it.
        computed: rows that this process computed; with several ranks, each computes its share.
        reused: rows that were there from a run that was stopped.
        residues: residues of the rows that this process computed.
        seconds: time of this run.
        long_sequences: what was read of sequences that are longer than the model reads.
        left_out: rows of the source that cannot be used and were left out, in all of it.
    """

    output: Path
    rows: int
    computed: int
    reused: int
    residues: int
    seconds: float
    long_sequences: str = "refused"
    left_out: int = 0

    def __str__(self) -> str:
        speed = f"{self.residues / self.seconds:,.0f} residues/s"
        reused = f"; {_were(self.reused)} there from a run that was stopped" if self.reused else ""
        long = "" if self.long_sequences == "refused" else f"; of longer sequences {self.long_sequences}"
        left_out = f"; of the file, {_were(self.left_out)} left out" if self.left_out else ""
        return f"{self.output}: {count_of(self.rows, 'row')}, {self.seconds:.1f} s, {speed}{reused}{long}{left_out}"


def _were(rows: int) -> str:
    return f"{count_of(rows, 'row')} {'was' if rows == 1 else 'were'}"


def map_file(
    compute: Compute,
    source: str | Path,
    output: str | Path,
    *,
    identity: str,
    longest: int | None = None,
    long_sequences: str = "refused",
    shard: tuple[int, int] = (1, 1),
    sequence: str | None = None,
    accession: str | None = None,
    on_error: OnError = "raise",
    description: str = "sequences",
    block_rows: int | None = None,
) -> FileResult:
    """Compute results for every sequence of a file, and write them in the order of the file.

    Several ranks of one run (``accelerate launch``, ``torchrun``) share the blocks, and the first writes the output.

    Args:
        compute: computes a block.
        source: a CSV, TSV, Excel, Parquet, JSON lines or FASTA file.
        output: a file that ends with .csv, .jsonl or .parquet. It exists only when it is whole. One that is there is
            replaced at the end, with a warning.
        identity: a text that differs for other results, such as those of another model. A run goes on with the blocks
            of a run with the same identity, source and shard, and computes all others again.
        longest: the most residues of a sequence; None for any.
        long_sequences: what is read of longer ones, in words.
        shard: the part of the rows to compute, such as ``(2, 5)`` for the second of five equal parts.
        sequence: the column of the sequences; None to find it by a usual name.
        accession: the column of the accessions, likewise. Without one, or where its cell is empty, the number of a row
            is its accession.
        on_error: ``"skip"`` leaves out rows that cannot be used, and logs how many and which are the first; a file
            beside the output, ``OUTPUT.left_out.csv``, lists all of them.
        description: what the progress bar counts.
        block_rows: sequences per block, whose results are in memory together; None for `BLOCK_ROWS`.

    Raises:
        DataError: a row is not a protein sequence or is too long, with its place; or the file cannot be read.
        ConfigurationError: the output has another suffix, the shard does not exist or has no rows, `on_error` is
            unknown, another run began to write the same output, or the output is the source, is a folder or cannot be
            written, such as on a full disk.
    """
    started = time.perf_counter()
    output = Path(output)
    written_as(output, source=source)
    part, parts = _shard(shard)
    columns = {"sequence": sequence, "accession": accession}
    rank, ranks = rank_and_ranks()
    listed = output.with_name(f"{output.name}.left_out.csv") if rank == 0 else None
    total, wrong = check_rows(source, longest=longest, on_error=on_error, **columns, listed=listed)
    rows = range(total * (part - 1) // parts, total * part // parts)
    if not rows:
        raise ConfigurationError(
            f"shard={part}/{parts}: {source} has only {count_of(total, 'row')} to use, so this part is empty"
        )
    block_rows = block_rows or BLOCK_ROWS
    what = (identity, sha256_of(source), rows, sequence, accession, block_rows)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()
    folder = blocks_folder(output)
    if rank == 0:
        if output.exists():
            logger.warning("%s exists, and is replaced when this run ends. Stop it to keep the file", output)
        with _named(output):
            _open_folder(folder, digest)
    _wait_for_all()
    files = [folder / f"block-{digest[:12]}-{number:06d}.arrow" for number in range(-(-len(rows) // block_rows))]
    finished = {file for file in files if file.exists()}
    _wait_for_all()  # before any rank adds a block
    computed = residues = reused = 0
    bar = tqdm(total=len(rows), desc=description, unit="seq", disable=rank > 0 or None)
    usable = usable_rows(source, wrong, **columns)
    for number, (file, block) in enumerate(zip(files, _blocks(usable, rows, block_rows), strict=True)):
        if file in finished:
            reused += len(block)
        elif number % ranks == rank:
            results = compute(CheckedSequences((row.sequence for row in block), (row.name for row in block)))
            with _named(output):
                _write_block(file, block, results)
            computed += len(block)
            residues += sum(count_residues(clean(row.sequence)) for row in block)
        bar.update(len(block))
    bar.close()
    _wait_for_all()
    if rank == 0:
        if not all(file.exists() for file in files):
            raise _other_run(folder)
        with _named(output):
            write_tables(map(_table, files), output)
        shutil.rmtree(folder)
    _wait_for_all()
    seconds = time.perf_counter() - started
    return FileResult(output, len(rows), computed, reused, residues, seconds, long_sequences, wrong.count)


def _shard(given: Any) -> tuple[int, int]:
    """Return the number of a part and of all parts.

    Raises:
        ConfigurationError: they are none.
    """
    is_pair = isinstance(given, Sequence) and len(given) == 2 and all(isinstance(number, int) for number in given)
    if not is_pair or not 1 <= given[0] <= given[1]:
        raise ConfigurationError(
            f"shard={given!r}: expected two whole numbers, that of the part, from 1, and that of all parts, such as "
            "(1, 3)"
        )
    return given[0], given[1]


def _blocks(rows: Iterator[Row], wanted: range, most: int) -> Iterator[list[Row]]:
    """Yield the wanted rows, counted from 0, in blocks of at most so many."""
    block: list[Row] = []
    for index, row in enumerate(rows):
        if index in wanted:
            block.append(row)
        if len(block) == most:
            yield block
            block = []
    if block:
        yield block


def _open_folder(folder: Path, digest: str) -> None:
    """Make the folder of the blocks, and remove what is in it from another run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file where the blocks are written: move it, or give another output")
    key = folder / "key.json"
    if folder.exists() and not (key.is_file() and key.read_text() == json.dumps(digest)):
        if any(file.suffix not in (".arrow", ".part", ".json") for file in folder.iterdir()):
            raise ConfigurationError(f"{folder} has other files in it: move them, or give another output")
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for left_over in folder.glob("*.part"):
        left_over.unlink()
    key.write_text(json.dumps(digest))


def _write_block(file: Path, rows: list[Row], columns: Mapping[str, Any]) -> None:
    import pyarrow as pa

    table = pa.table({"accession": [row.accession for row in rows], **columns})
    partial = file.with_suffix(".part")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(partial, file)
    except FileNotFoundError as error:
        raise _other_run(file.parent) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _named(output: Path) -> Iterator[None]:
    """Name the output in an error of the system, which would name a file beside it, or none."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{output} cannot be written: {os.strerror(error.errno) if error.errno else error}. Correct that, and "
            "start the same command again: it goes on after the last finished block. Or give another output"
        ) from error


def _other_run(folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"another run has taken {folder} while this one computed. Give each run, and each shard, an output of its own"
    )


def _table(file: Path) -> pa.Table:
    """Read a block."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def rank_and_ranks() -> tuple[int, int]:
    """Return the number of this process and of all processes of a distributed run, which is joined if there is one."""
    if "RANK" not in os.environ:
        return 0, 1
    import torch
    from accelerate import PartialState

    # Without cpu=True, the processes of a machine without an accelerator do not find each other. The others wait while
    # the first writes the output, which may take longer than the usual limit of minutes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    return state.process_index, state.num_processes


def _wait_for_all() -> None:
    if rank_and_ranks()[1] > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
