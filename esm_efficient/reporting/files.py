"""Write Arrow tables to a file of results: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.reporting.tables import format_csv

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["csv", "jsonl", "parquet"]

_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def written_as(output: str | Path) -> Format:
    """Return the format of an output file, by its suffix.

    Raises:
        ConfigurationError: its suffix is unknown, or its folder does not exist or cannot be written to.
    """
    output = Path(output)
    if output.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"{output}: expected a file that ends with {listing(list(_SUFFIXES))}")
    if not output.absolute().parent.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise ConfigurationError(f"{output}: its folder does not exist, or no file can be written there")
    return _SUFFIXES[output.suffix.lower()]


def write_tables(tables: Iterable[pa.Table], output: str | Path) -> None:
    """Write tables with the same columns, one after the other; the file exists only when it is whole.

    In CSV, the entries of a list have spaces between them, and texts that a spreadsheet would run are escaped.

    Args:
        tables: at least one table.
        output: a file that ends with .csv, .jsonl or .parquet.

    Raises:
        ConfigurationError: as `written_as`.
    """
    output = Path(output)
    write = {"csv": _write_csv, "jsonl": _write_json_lines, "parquet": _write_parquet}[written_as(output)]
    partial = output.with_name(f"{output.name}.part")
    write(iter(tables), partial)
    os.replace(partial, output)


def _write_csv(tables: Iterator[pa.Table], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        for number, table in enumerate(tables):
            cells = [[_csv_cell(cell) for cell in row.values()] for row in table.to_pylist()]
            text, header = format_csv(cells, table.column_names), format_csv([], table.column_names)
            handle.write(text if number == 0 else text.removeprefix(header))


def _csv_cell(cell: Any) -> Any:
    return " ".join(map(str, cell)) if isinstance(cell, list) else cell


def _write_json_lines(tables: Iterator[pa.Table], path: Path) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for table in tables:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    from pyarrow import parquet

    first = next(tables)
    with parquet.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
