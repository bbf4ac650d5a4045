"""The rows of a file of sequences: read one by one, and all checked before anything is computed."""

from __future__ import annotations

import csv
import itertools
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import numpy as np

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.data.fasta import LeaveOut
from esm_efficient.data.readers import Block, read_blocks
from esm_efficient.data.schema import find_column, refuse_column, texts_of
from esm_efficient.data.sequences import NucleotideCount, clean, count_residues
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.inference.inputs import count_unknown, problem_of, warn_of_unknown

logger = logging.getLogger(__name__)

_SHOWN = 3


class Row(NamedTuple):
    """A sequence of a file: its accession, its text as it is in the file, and its place for messages."""

    accession: str
    sequence: str
    place: str
    is_numbered: bool
    """Whether the accession is the number of the row, since it has no other."""

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.place} (accession {self.accession})"


def _ignore(place: str, problem: str) -> None:
    """Leave out a row that was counted when the file was checked."""


def read_sequences(
    source: str | Path,
    *,
    sequence: str | None = None,
    accession: str | None = None,
    leave_out: LeaveOut | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file, in its order.

    Args:
        source: as `predict_file`.
        sequence: as `predict_file`.
        accession: as `predict_file`.
        leave_out: takes the rows that cannot be parsed; None to raise an error.

    Raises:
        DataError: the file cannot be read, or has no column of sequences.
    """
    number = 0
    for block, column, names in _read_columns(source, sequence, accession, leave_out):
        accessions = [""] * len(block.places) if names is None else texts_of(block.columns[names])
        for name, text, place in zip(accessions, block.columns[column], block.places, strict=True):
            number += 1
            yield Row(name or str(number), text, place, not name)


def _read_columns(
    source: str | Path, sequence: str | None, accession: str | None, leave_out: LeaveOut | None
) -> Iterator[tuple[Block, str, str | None]]:
    """Yield the blocks of a file with the columns of sequences and of accessions; None if it has no accessions."""
    for block in read_blocks(source, leave_out=leave_out):
        column = find_column("sequence", block.columns, sequence, source, taken=(accession,))
        if column is None:
            raise DataError(
                f"{source} has the columns {listing(list(block.columns))}, and none has a usual name of sequences. "
                "Name the one that holds them with sequence="
            )
        yield block, column, find_column("accession", block.columns, accession, source, taken=(column,))


class WrongRows:
    """Rows of a file that cannot be used, in memory that hardly grows with their number.

    Args:
        path: a CSV file to list all of them in, which is made with the first; None for none.

    Attributes:
        count: how many there are.
        rows: the numbers of those that can be parsed, ascending from 0.
        shown: what is wrong with the first ones.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.count = 0
        self.rows = array("q")
        self.shown: list[str] = []
        self._path = path
        self._file: IO[str] | None = None

    def add(self, place: str, problem: str, row: int | None = None) -> None:
        """Count a row; `row` is its number, or None if it cannot be parsed."""
        if self._path is not None:
            self._list(self._path, place, problem)
        self.count += 1
        if row is not None:
            self.rows.append(row)
        if len(self.shown) < _SHOWN:
            self.shown.append(f"{place} {problem}")

    def close(self) -> None:
        """Finish the list of rows."""
        if self._file is not None:
            self._file.close()

    def _list(self, path: Path, place: str, problem: str) -> None:
        if self._file is None:
            self._file = path.open("w", encoding="utf-8", newline="")
            csv.writer(self._file, lineterminator="\n").writerow(("place", "problem"))
        csv.writer(self._file, lineterminator="\n").writerow((place, problem))

    def __str__(self) -> str:
        more = self.count - len(self.shown)
        return ", ".join(self.shown) + (f" and {more:,} more" if more else "")


class CheckedRows(NamedTuple):
    """How many rows of a file can be used, and those that cannot."""

    usable: int
    wrong: WrongRows


def check_rows(
    source: str | Path,
    *,
    longest: int | None = None,
    on_error: OnError = "raise",
    sequence: str | None = None,
    accession: str | None = None,
    listed: Path | None = None,
) -> CheckedRows:
    """Check every row of a file.

    Args:
        source: as `predict_file`.
        longest: the most residues of a sequence; None for any.
        on_error: as `predict_file`.
        sequence: as `predict_file`.
        accession: as `predict_file`.
        listed: a CSV file for the rows that are left out, with what is wrong with them; None for none.

    Returns:
        The number of rows that can be used, and those that cannot.

    Raises:
        DataError: a row cannot be used, and `on_error` is not ``"skip"``; there is no row to use; or most sequences are
            nucleotides.
        ConfigurationError: `on_error` is unknown.
    """
    if on_error not in get_args(OnError):
        raise ConfigurationError(f'on_error={on_error!r}: expected "raise" or "skip"')
    if listed is not None:
        listed.unlink(missing_ok=True)  # of a former run
    wrong = WrongRows(listed if on_error == "skip" else None)
    columns = {"sequence": sequence, "accession": accession}
    leave_out = None if on_error == "raise" else lambda place, problem: wrong.add(f"{place}:", problem)
    rows, unknown, too_long, numbered, nucleotides = 0, 0, False, False, NucleotideCount()
    accessions = array("q")  # hashes: the texts of a large file would need much memory
    with closing(wrong):
        for row in read_sequences(source, **columns, leave_out=leave_out):
            rows += 1
            numbered |= row.is_numbered
            accessions.append(hash(row.accession))
            problem = problem_of(row.sequence) if isinstance(row.sequence, str) else "is not text"
            if not problem and longest is not None and (size := count_residues(clean(row.sequence))) > longest:
                problem, too_long = f"has {size:,} residues, more than {longest:,}", True
            if problem:
                wrong.add(row.place, problem, rows - 1)
            else:
                nucleotides.add([row.sequence], [row.place])
                unknown += count_unknown(row.sequence)
    if not rows:
        raise DataError(f"{source} has no sequence{f': {wrong}' if wrong.count else ''}")
    usable = rows - len(wrong.rows)
    if not usable:
        block, column, names = next(_read_columns(source, sequence, accession, _ignore))
        if set(block.columns) - {column, names, "header"}:  # FASTA has a header; another column may be the right one
            refuse_column(block.columns, column, block.places, source)
    problems = f"{wrong.count:,} of {usable + wrong.count:,} rows cannot be used: {wrong}"
    if too_long:
        problems += '. Of sequences that are too long, read a part with keep="start", or all with keep="windows"'
    if wrong.count and (on_error == "raise" or not usable):
        cure = '. Correct wrong rows, or leave them out with on_error="skip"' if usable else ""
        raise DataError(f"{source}: {problems}{cure}")
    if numbered and wrong.count > len(wrong.rows):
        raise DataError(
            f"{source}: {problems}. Rows have no accession, and their numbers would not be those of the file: correct "
            "these rows, or name a column with accession="
        )
    if wrong.count:
        where = f". All of them are in {listed}" if listed is not None and wrong.count > _SHOWN else ""
        logger.warning("left out of %s: %s%s", source, problems, where)
    if warning := nucleotides.warning(str(source)):
        logger.warning("%s: %s", source, warning)
    warn_of_unknown(unknown, str(source))
    _warn_of_repeated(accessions, source, **columns, leave_out=None if not wrong.count else _ignore)
    return CheckedRows(usable, wrong)


def _warn_of_repeated(hashes: Sequence[int], source: str | Path, **options: Any) -> None:
    """Warn of accessions that several rows have; `hashes` has those of all rows, in the order of the file."""
    known = np.asarray(hashes)
    ordered = np.sort(known)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated):
        places = np.flatnonzero(np.isin(known, repeated))
        _, firsts = np.unique(known[places], return_index=True)
        index = int(places[np.setdiff1d(np.arange(len(places)), firsts).min()])
        first = next(itertools.islice(read_sequences(source, **options), index, None))
        logger.warning(
            "%s: %s on several rows, such as %s on %s. Rows of the output are in the order of the file",
            source,
            "1 accession is" if len(repeated) == 1 else f"{len(repeated):,} accessions are",
            first.accession,
            first.place.removeprefix(f"{source}, "),
        )


def usable_rows(
    source: str | Path, wrong: WrongRows, *, sequence: str | None = None, accession: str | None = None
) -> Iterator[Row]:
    """Yield the rows of a file that was checked, without the wrong ones; the other arguments are as in `map_file`."""
    left_out = iter(wrong.rows)
    skipped = next(left_out, None)
    leave_out = _ignore if wrong.count > len(wrong.rows) else None
    for index, row in enumerate(read_sequences(source, sequence=sequence, accession=accession, leave_out=leave_out)):
        if index == skipped:
            skipped = next(left_out, None)
        else:
            yield row
