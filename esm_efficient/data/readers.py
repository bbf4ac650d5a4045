"""Rows of CSV, TSV, Excel, Parquet, JSON lines and FASTA: from a file, or from a text such as the body of a request.

A file is read in blocks of rows, so it may be larger than memory. Cells stay text, nothing is guessed, and an error
names the line or the record that cannot be parsed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from esm_efficient.data.delimited import read_table
from esm_efficient.data.fasta import LeaveOut, accession_of, read_fasta, read_fasta_table
from esm_efficient.data.opening import FREE_BYTES, MAX_RATIO, MAX_ROW_CHARACTERS, first_bytes, open_text
from esm_efficient.data.workbooks import is_workbook, read_workbook
from esm_efficient.errors import ConfigurationError, DataError, listing

__all__ = ["Block", "accession_of", "kind_of", "open_text", "read_blocks", "read_fasta", "read_rows", "read_table"]

BLOCK_ROWS = 10_000
"""The most rows of a file that are in memory at once."""

BLOCK_CHARACTERS = 1 << 24
"""The characters of the rows in memory at which a block ends."""

_PARQUET_VALUES = 1 << 23
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Block(NamedTuple):
    """Some rows of a file.

    Attributes:
        columns: column name to cells: text, or the values of a Parquet or JSON lines file.
        places: where each row is, for messages, such as ``line 3``.
    """

    columns: dict[str, list[Any]]
    places: list[str]


def read_blocks(
    path: str | Path, *, rows: int = BLOCK_ROWS, header: str | None = None, leave_out: LeaveOut | None = None
) -> Iterator[Block]:
    """Read a CSV, TSV, Excel, Parquet, JSON lines or FASTA file, a block of rows at a time.

    Text files may be packed with gzip or xz. Of a workbook the only sheet with cells is read
    (`esm_efficient.data.workbooks.read_workbook`).

    A FASTA file has the columns ``accession``, ``header`` and ``sequence``; ``labels`` if a line of labels is below
    each sequence; and those of `esm_efficient.data.fasta.HEADER_KEYS` that its first headers have as ``KEY=value``. The
    accession is the first word of the header, or the middle part of a UniProt name such as ``sp|P12345|NAME``.

    Args:
        path: the file.
        rows: the largest number of rows in a block.
        header: a regular expression for FASTA headers; its named groups become columns, and keys do not.
        leave_out: takes the rows that cannot be parsed; None to raise an error.

    Raises:
        DataError: the file cannot be read, a row has too few or too many cells, or a header does not match.
        ConfigurationError: `header` is not a regular expression with named groups, or the file is not FASTA; or a
            workbook is given and openpyxl is not installed.
    """
    kind = kind_of(path)
    if header is not None and kind != "fasta":
        raise ConfigurationError(f"{path} is not a FASTA file: header= is for FASTA headers only")
    if kind == "parquet":
        yield from _parquet_blocks(path, rows)
        return
    if kind == "workbook":
        names, cells = read_workbook(path, leave_out=leave_out)
        yield from _blocks_of(names, cells, rows, _text_size)
        return
    pattern = None if header is None else _header_pattern(header)
    parsed: Iterator[tuple[str, Sequence[Any]]]
    with open_text(path) as handle:
        if kind == "table":
            names, parsed = read_table(handle, path, leave_out=leave_out)
        elif kind == "json":
            names, parsed = _read_json_lines(handle, path, leave_out)
        else:
            names, parsed = read_fasta_table(handle, path, keys=pattern is None, leave_out=leave_out)
        for block in _blocks_of(names, parsed, rows, _json_size if kind == "json" else _text_size):
            if pattern is not None:
                block = _with_header_groups(block, pattern, path, leave_out)
            if block.places:
                yield block


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


def _text_size(cells: Sequence[str]) -> int:
    return sum(map(len, cells))


def _json_size(cells: Sequence[Any]) -> int:
    return sum(len(cell) for cell in cells if isinstance(cell, str | list | dict))


def _blocks_of(
    names: Sequence[str],
    parsed: Iterable[tuple[str, Sequence[Any]]],
    rows: int,
    size: Callable[[Sequence[Any]], int],
) -> Iterator[Block]:
    """Divide rows into blocks of at most `rows` rows that end at `BLOCK_CHARACTERS`."""
    chunk, characters = [], 0
    for row in itertools.chain(parsed, [None]):
        if row is not None:
            chunk.append(row)
            characters += size(row[1])
        if chunk and (row is None or len(chunk) == rows or characters > BLOCK_CHARACTERS):
            columns = zip(*(cells for _, cells in chunk), strict=True)
            yield Block(dict(zip(names, map(list, columns), strict=True)), [place for place, _ in chunk])
            chunk, characters = [], 0


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError if a key is there twice, of which Python would keep the last."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def _read_json_lines(
    handle: Iterable[str], source: str | Path, leave_out: LeaveOut | None
) -> tuple[list[str], Iterator[tuple[str, list[Any]]]]:
    """The columns of the first objects, and the place and the cells of each; a key that is missing is an empty cell."""

    def objects() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                cells, problem = json.loads(line, object_pairs_hook=_once), "the line is not a JSON object"
                if _SURROGATE.search(line):
                    json.dumps(cells, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                cells, problem = None, f"{error.object[error.start]!a} is half of a character"
            except (ValueError, RecursionError) as error:
                cells, problem = None, f"the line is not JSON ({str(error)[:80]})"
            if isinstance(cells, dict):
                yield f"line {number}", cells
            elif leave_out is None:
                raise DataError(f"{source}, line {number}: {problem}. Write one object per line (JSON lines)")
            else:
                leave_out(f"{source}, line {number}", problem)

    records, first, size = objects(), list[tuple[str, dict[str, Any]]](), 0
    for record in records:
        first.append(record)
        size += _json_size(list(record[1].values()))
        if len(first) == BLOCK_ROWS or size > BLOCK_CHARACTERS:
            break
    if not first:
        raise DataError(f"{source} has no JSON object")
    names = list(dict.fromkeys(name for _, cells in first for name in cells))

    def rows() -> Iterator[tuple[str, list[Any]]]:
        for place, cells in itertools.chain(first, records):
            if other := [key[:40] for key in cells if key not in names]:
                problem = f"the key(s) {listing(other)} are not in the first {len(first):,} objects"
                if leave_out is None:
                    raise DataError(f"{source}, {place}: {problem}")
                leave_out(f"{source}, {place}", problem)
                continue
            yield place, [cells.get(name) for name in names]

    return names, rows()


def kind_of(path: str | Path) -> Literal["parquet", "workbook", "fasta", "json", "table"]:
    """Return the format of a file, from its first bytes or its first line.

    Raises:
        DataError: the file is missing or empty, or cannot be read.
    """
    if is_workbook(path):
        return "workbook"
    if first_bytes(path).startswith(b"PAR1"):
        return "parquet"
    empty = True
    with open_text(path) as text:
        for line in text:
            if "\0" in line:
                raise DataError(
                    f"{path} has a null character in its first line, so it is not text. Expected text in UTF-8"
                )
            if line.startswith(">"):
                return "fasta"
            if line.startswith("{"):
                return "json"
            if re.match(r"\[\s*(\{|$)", line):
                raise DataError(f"{path} is one JSON list. Write one object per line (JSON lines)")
            # A line that begins with ";" is a FASTA comment, or the header of a table with an unnamed first column.
            if line.strip() and not line.startswith(";"):
                return "table"
            empty = empty and not line.strip()
    if not empty:
        return "table"
    raise DataError(f"{path} is empty")


def _parquet_blocks(path: str | Path, rows: int) -> Iterator[Block]:
    """Read Parquet with text as dictionaries, so that a text that is repeated is in memory once."""
    import pyarrow as pa
    from pyarrow import parquet

    start = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}: more than one column is named {listing([name[:40] for name in repeated])}")
            texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
            most = _parquet_batch_rows(path, file.metadata, rows)
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=most):
                for part in _small_batches(batch, path, start):
                    places = [f"row {start + index}" for index in range(part.num_rows)]
                    yield Block({name: part.column(name).to_pylist() for name in part.schema.names}, places)
                    start += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error


def _parquet_batch_rows(path: str | Path, metadata: Any, rows: int) -> int:
    """How many rows to read at once, so that a batch has a bounded number of values.

    Raises:
        DataError: a column unpacks to far more than its size, or has far more values than rows.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            unpacked = column.total_uncompressed_size
            if unpacked > max(FREE_BYTES, MAX_RATIO * column.total_compressed_size):
                raise DataError(
                    f"{path}: the column {column.path_in_schema} unpacks to more than {MAX_RATIO} times its "
                    "size, which no column of sequences does"
                )
            values_per_row = column.num_values // max(group.num_rows, 1)
            if values_per_row > MAX_ROW_CHARACTERS:
                raise DataError(f"{path}: the column {column.path_in_schema} has {values_per_row:,} values per row")
            rows = min(rows, max(_PARQUET_VALUES // max(values_per_row, 1), 1))
    return rows


def _small_batches(batch: Any, path: str | Path, start: int) -> Iterator[Any]:
    """Divide a batch so that its texts, written out, have a bounded size.

    Raises:
        DataError: a text is too long.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    sizes = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type):
            lengths = pc.fill_null(pc.binary_length(column.dictionary).take(column.indices), 0)
            sizes += lengths.to_numpy(zero_copy_only=False)
    if (long := np.flatnonzero(sizes > MAX_ROW_CHARACTERS)).size:
        raise DataError(f"{path}, row {start + long[0]}: more than {MAX_ROW_CHARACTERS:,} characters")
    groups = np.cumsum(sizes) // BLOCK_CHARACTERS
    ends = [*np.flatnonzero(np.diff(groups)) + 1, batch.num_rows]
    for first, end in itertools.pairwise([0, *ends]):
        yield batch.slice(first, end - first)


def _is_text(dtype: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _header_pattern(header: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(header)
    except re.error as error:
        raise ConfigurationError(f"header={header!r} is not a regular expression ({error})") from error
    if not pattern.groupindex:
        raise ConfigurationError(f"header={header!r} has no named group, such as (?P<label>...)")
    return pattern


def _with_header_groups(block: Block, pattern: re.Pattern[str], path: str | Path, leave_out: LeaveOut | None) -> Block:
    """The block with one more column for each named group of the header pattern."""
    matches = [pattern.search(header) for header in block.columns["header"]]
    wrong = [place for place, match in zip(block.places, matches, strict=True) if match is None]
    if wrong and leave_out is None:
        raise DataError(
            f"{path}: the header does not match {pattern.pattern!r} in {len(wrong)} record(s): {listing(wrong)}. "
            'Leave such records out with on_error="skip"'
        )
    if wrong and leave_out is not None:
        for place in wrong:
            leave_out(f"{path}, {place}", f"the header does not match {pattern.pattern!r}")
        block = block_without(block, [index for index, match in enumerate(matches) if match is None])
    groups = {name: [match[name] or "" for match in matches if match] for name in pattern.groupindex}
    return block._replace(columns=block.columns | groups)


def block_without(block: Block, rows: Iterable[int]) -> Block:
    """Return a block without some rows, counted from 0."""
    gone = set(rows)
    kept = [index for index in range(len(block.places)) if index not in gone]
    columns = {name: [cells[index] for index in kept] for name, cells in block.columns.items()}
    return Block(columns, [block.places[index] for index in kept])
