"""Rows of a table or a FASTA file, a block at a time, so that a file may be larger than memory.

Nothing is guessed and nothing is lost: cells stay text, and what does not parse is an error that names its place.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from esm_efficient.errors import DataError, listing

BLOCK = 10_000
"""Rows that are held at once."""

_BROKEN = (OSError, EOFError, UnicodeError, csv.Error, lzma.LZMAError, zlib.error)


class Block(NamedTuple):
    """Some rows of a file.

    Attributes:
        columns: name to cells; text, or whatever a Parquet file holds.
        places: what to call each row in a message.
    """

    columns: dict[str, list[Any]]
    places: list[str]


def compression_of(path: str | Path) -> Literal["gzip", "xz"] | None:
    """How a file is packed, by its first bytes: its name may not say."""
    with open(path, "rb") as handle:
        start = handle.read(6)
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    return "xz" if start == b"\xfd7zXZ\x00" else None


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """A file as text in UTF-8, unpacked, without a byte order mark and with its own line ends.

    Raises:
        DataError: there is no such file; or, while it is read, it is no text or is packed and broken.
    """
    if not Path(path).is_file():
        raise DataError(f"no file at {path}")
    try:
        opener: Any = {"gzip": gzip.open, "xz": lzma.open, None: open}[compression_of(path)]
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as handle:
            yield handle
    except _BROKEN as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def kind_of(path: str | Path) -> Literal["parquet", "fasta", "table"]:
    """What a file is, by its first bytes.

    Raises:
        DataError: it is empty, or cannot be read.
    """
    if not Path(path).is_file():
        raise DataError(f"no file at {path}")
    with open(path, "rb") as handle:
        if handle.read(4) == b"PAR1":
            return "parquet"
    empty = True
    with open_text(path) as text:
        for line in text:
            if line.startswith(">"):
                return "fasta"
            # A comment, or a table whose first column has no name.
            if line.strip() and not line.startswith(";"):
                return "table"
            empty = empty and not line.strip()
    if not empty:
        return "table"
    raise DataError(f"{path} is empty")


def read_blocks(path: str | Path, *, rows: int = BLOCK) -> Iterator[Block]:
    """The rows of a CSV, TSV, Parquet or FASTA file; plain, gzip or xz.

    A FASTA file has the columns ``accession``, the first word of a header (of ``sp|P12345|NAME`` the middle part),
    ``header`` and ``sequence``.

    Args:
        path: of the file.
        rows: the most rows of a block.

    Raises:
        DataError: it cannot be read, or a row has too few or too many cells.
    """
    reader = {"parquet": _parquet, "fasta": _fasta, "table": _table}[kind_of(path)]
    yield from reader(path, rows)


def _table(path: str | Path, rows: int) -> Iterator[Block]:
    with open_text(path) as handle:
        first = handle.readline()
        while first and not first.strip():
            first = handle.readline()
        reader = csv.reader(_then(first, handle), delimiter=_delimiter(first), strict=True)
        names = [name.strip() for name in next(reader)]
        if double := sorted({name for name in names if names.count(name) > 1 and name}):
            raise DataError(f"{path}: more than one column is named {listing(double)}")
        # The unnamed first column that pandas writes is the row's number.
        names = [name or f"unnamed {index}" for index, name in enumerate(names)]
        held: list[list[str]] = []
        places: list[str] = []
        for cells in _checked(reader, path):
            if not cells:
                continue  # an empty line
            place = f"line {reader.line_num}"
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, {place}: {len(cells)} cells for {len(names)} columns ({', '.join(names)}). A cell that "
                    "holds the separator must be quoted"
                )
            if reader.dialect.delimiter == "\t" and any("\n" in cell for cell in cells):
                raise DataError(f"{path}, {place}: a cell goes over several lines: is a quote left open?")
            held.append(cells)
            places.append(place)
            if len(held) == rows:
                yield Block(dict(zip(names, map(list, zip(*held, strict=True)), strict=True)), places)
                held, places = [], []
        if held:
            yield Block(dict(zip(names, map(list, zip(*held, strict=True)), strict=True)), places)


def _checked(reader: Any, path: str | Path) -> Iterator[list[str]]:
    """The rows of a CSV reader; what it cannot parse names its line."""
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _then(first: str, handle: IO[str]) -> Iterator[str]:
    yield first
    yield from handle


def _delimiter(header: str) -> str:
    """What separates the names of a header: the commonest of the usual three."""
    return max("\t,;", key=header.count)


def _parquet(path: str | Path, rows: int) -> Iterator[Block]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        start = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=rows):
            places = [f"row {start + index}" for index in range(batch.num_rows)]
            yield Block({name: batch.column(name).to_pylist() for name in batch.schema.names}, places)
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error


def _fasta(path: str | Path, rows: int) -> Iterator[Block]:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with open_text(path) as handle:
        columns: dict[str, list[Any]] = {"accession": [], "header": [], "sequence": []}
        number = 0
        for header, sequence in SimpleFastaParser(line for line in handle if not line.startswith(";")):
            number += 1
            accession = accession_of(header.split(None, 1)[0] if header.strip() else "")
            for column, value in (("accession", accession), ("header", header), ("sequence", sequence)):
                columns[column].append(value)
            if len(columns["header"]) == rows:
                yield _named(columns, number)
                columns = {column: [] for column in columns}
        if columns["header"]:
            yield _named(columns, number)


def accession_of(name: str) -> str:
    """The accession in a name of UniProt; any other name as it is.

    Example:
        >>> accession_of("sp|P12345|NAME_HUMAN"), accession_of("P12345")
        ('P12345', 'P12345')
    """
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


def _named(columns: dict[str, list[Any]], last: int) -> Block:
    first = last - len(columns["header"]) + 1
    return Block(columns, [f"record {first + i} ({name})" for i, name in enumerate(columns["accession"])])
