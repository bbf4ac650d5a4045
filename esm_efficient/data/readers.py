"""Rows of CSV, TSV, Parquet and FASTA: from a file, or from a text such as the body of a request.

A file is read in blocks of rows, so it may be larger than memory. Cells stay text, nothing is guessed, and an error
names the line or the record that cannot be parsed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from esm_efficient.errors import ConfigurationError, DataError, listing

BLOCK_ROWS = 10_000
"""Rows of a file that are in memory at once."""

FASTA_COLUMNS = ("accession", "header", "sequence")
"""Columns of a FASTA file."""

_READ_ERRORS = (OSError, EOFError, UnicodeError, lzma.LZMAError, zlib.error)


class Block(NamedTuple):
    """Some rows of a file.

    Attributes:
        columns: column name to cells: text, or the values of a Parquet file.
        places: where each row is, for messages, such as ``line 3``.
    """

    columns: dict[str, list[Any]]
    places: list[str]


def read_blocks(path: str | Path, *, rows: int = BLOCK_ROWS, header: str | None = None) -> Iterator[Block]:
    """Read a CSV, TSV, Parquet or FASTA file, plain, gzip or xz, a block of rows at a time.

    A FASTA file has the columns ``accession``, ``header`` and ``sequence``. The accession is the first word of the
    header, or the middle part of a UniProt name such as ``sp|P12345|NAME``.

    Args:
        path: the file.
        rows: the largest number of rows in a block.
        header: a regular expression for FASTA headers; its named groups become columns.

    Raises:
        DataError: the file cannot be read, a row has too few or too many cells, or a header does not match.
        ConfigurationError: `header` is not a regular expression with named groups, or the file is not FASTA.
    """
    kind = kind_of(path)
    if header is not None and kind != "fasta":
        raise ConfigurationError(f"{path} is not a FASTA file: header= is for FASTA headers only")
    if kind == "parquet":
        yield from _parquet_blocks(path, rows)
        return
    pattern = None if header is None else _header_pattern(header)
    with open_text(path) as handle:
        names, parsed = read_table(handle, path) if kind == "table" else (FASTA_COLUMNS, read_fasta(handle, path))
        while chunk := list(itertools.islice(parsed, rows)):
            cells = zip(*(cells for _, cells in chunk), strict=True)
            block = Block(dict(zip(names, map(list, cells), strict=True)), [place for place, _ in chunk])
            yield block if pattern is None else _with_header_groups(block, pattern, path)


def read_rows(path: str | Path) -> Block:
    """Read all rows of a file that fits into memory, as `read_blocks` does.

    Raises:
        DataError: as `read_blocks`, or the file has no rows.
    """
    blocks = list(read_blocks(path))
    if not blocks:
        raise DataError(f"{path} has column names but no rows")
    columns = {name: [cell for block in blocks for cell in block.columns[name]] for name in blocks[0].columns}
    return Block(columns, [place for block in blocks for place in block.places])


def read_table(
    handle: IO[str], source: str | Path, *, delimiter: str | None = None
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    r"""Read the column names and the rows of a CSV or TSV text.

    Args:
        handle: the text, with its own line ends (``newline=""``).
        source: the name of the text in errors, such as its path.
        delimiter: the character between cells; None for the most frequent of tab, comma and semicolon in the first
            line.

    Returns:
        The column names, and an iterator over the rows: the place of each, such as ``line 3``, and its cells. Lines of
        white space are skipped.

    Raises:
        DataError: the text is empty, two columns have the same name, or a row cannot be parsed.

    Example:
        >>> names, rows = read_table(io.StringIO("id,sequence\nP1,MKT\n"), "example")
        >>> names, list(rows)
        (['id', 'sequence'], [('line 2', ['P1', 'MKT'])])
    """
    skipped, first = 0, handle.readline()
    while first and not first.strip():
        skipped, first = skipped + 1, handle.readline()
    if not first:
        raise DataError(f"{source} is empty")
    delimiter = delimiter or max("\t,;", key=first.count)
    lines = _numbered_lines(itertools.chain([first], handle), source, delimiter, skipped)
    names = [name.strip() for name in next(lines)[1]]
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise DataError(f"{source}: more than one column is named {listing([name[:40] for name in repeated])}")
    # pandas writes row numbers into a first column without a name.
    names = [name or f"unnamed {index}" for index, name in enumerate(names)]
    return names, _complete_rows(lines, names, source, delimiter)


def _numbered_lines(
    text: Iterable[str], source: str | Path, delimiter: str, skipped: int
) -> Iterator[tuple[str, list[str]]]:
    """The place and the cells of each line; an error of the parser names the line."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield f"line {skipped + reader.line_num}", cells
    except csv.Error as error:
        raise DataError(f"{source}, line {skipped + reader.line_num}: {error}") from error


def _complete_rows(
    lines: Iterable[tuple[str, list[str]]], names: Sequence[str], source: str | Path, delimiter: str
) -> Iterator[tuple[str, list[str]]]:
    """The lines that are not empty; each must have one cell per column."""
    for place, cells in lines:
        if len(cells) != len(names):
            if not any(cell.strip() for cell in cells):
                continue
            raise DataError(
                f"{source}, {place}: {len(cells)} cells for {len(names)} columns "
                f"({listing([name[:40] for name in names])}). Quote a cell that contains the separator"
            )
        if delimiter == "\t" and any("\n" in cell for cell in cells):
            raise DataError(f"{source}, {place}: a cell spans several lines. Check for a quote that is not closed")
        yield place, cells


def read_fasta(handle: Iterable[str], source: str | Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    r"""Read the records of a FASTA text; lines that begin with ``;`` are comments.

    Args:
        handle: the lines of the text.
        source: the name of the text in errors.

    Yields:
        The place of a record, such as ``record 1 (P12345)``, and its accession, header and sequence.

    Raises:
        DataError: the text does not begin with a header.

    Example:
        >>> list(read_fasta([">sp|P12345|NAME A protein\n", "MK\n", "TV\n"], "example"))
        [('record 1 (P12345)', ('P12345', 'sp|P12345|NAME A protein', 'MKTV'))]
    """
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    lines = (line for line in handle if not line.startswith(";"))
    first = next((line for line in lines if line.strip()), "")
    if not first.startswith(">"):
        raise DataError(f"{source} does not begin with a FASTA header, '>'")
    for number, (header, sequence) in enumerate(SimpleFastaParser(itertools.chain([first], lines)), 1):
        accession = accession_of(header.split(None, 1)[0] if header.strip() else "")
        yield f"record {number} ({accession})", (accession, header, sequence)


def accession_of(name: str) -> str:
    """Return the accession in a UniProt name; any other name unchanged.

    Example:
        >>> accession_of("sp|P12345|NAME_HUMAN"), accession_of("P12345")
        ('P12345', 'P12345')
    """
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


def kind_of(path: str | Path) -> Literal["parquet", "fasta", "table"]:
    """Return the format of a file, from its first bytes or its first line.

    Raises:
        DataError: the file is missing or empty, or cannot be read.
    """
    if _first_bytes(path).startswith(b"PAR1"):
        return "parquet"
    empty = True
    with open_text(path) as text:
        for line in text:
            if line.startswith(">"):
                return "fasta"
            # A line that begins with ";" is a FASTA comment, or the header of a table with an unnamed first column.
            if line.strip() and not line.startswith(";"):
                return "table"
            empty = empty and not line.strip()
    if not empty:
        return "table"
    raise DataError(f"{path} is empty")


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file, plain, gzip or xz, without its byte order mark and with its own line ends.

    Raises:
        DataError: the file is missing; or, while it is read, it is not UTF-8 text or its compression is damaged.
    """
    try:
        start = _first_bytes(path)
        opener: Any = gzip.open if start.startswith(b"\x1f\x8b") else lzma.open if start == b"\xfd7zXZ\x00" else open
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as handle:
            yield handle
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _first_bytes(path: str | Path) -> bytes:
    """The first six bytes of a file: they tell its format and compression, which its name may not."""
    if not Path(path).is_file():
        raise DataError(f"no file at {path}")
    with open(path, "rb") as handle:
        return handle.read(6)


def _parquet_blocks(path: str | Path, rows: int) -> Iterator[Block]:
    import pyarrow as pa
    from pyarrow import parquet

    start = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=rows):
            places = [f"row {start + index}" for index in range(batch.num_rows)]
            yield Block({name: batch.column(name).to_pylist() for name in batch.schema.names}, places)
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error


def _header_pattern(header: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(header)
    except re.error as error:
        raise ConfigurationError(f"header={header!r} is not a regular expression ({error})") from error
    if not pattern.groupindex:
        raise ConfigurationError(f"header={header!r} has no named group, such as (?P<label>...)")
    return pattern


def _with_header_groups(block: Block, pattern: re.Pattern[str], path: str | Path) -> Block:
    """The block with one more column for each named group of the header pattern."""
    matches = [pattern.search(header) for header in block.columns["header"]]
    if wrong := [place for place, match in zip(block.places, matches, strict=True) if match is None]:
        raise DataError(
            f"{path}: the header does not match {pattern.pattern!r} in {len(wrong)} record(s): {listing(wrong)}"
        )
    groups = {name: [match[name] or "" for match in matches if match] for name in pattern.groupindex}
    return block._replace(columns=block.columns | groups)
