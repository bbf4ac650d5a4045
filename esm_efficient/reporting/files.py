"""Write Arrow tables to a file of results: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.reporting.tables import format_csv

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["csv", "jsonl", "parquet"]

_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def written_as(output: str | Path, *, source: Any = None) -> Format:
    """Return the format of an output file, by its suffix.

    Args:
        output: the file.
        source: what the results are computed from; a file must not be overwritten.

    Raises:
        ConfigurationError: the suffix is unknown, the output is a folder, its folder does not exist or cannot be
            written to, or it or a file that is written beside it is the source.
    """
    output = Path(output)
    if output.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"{output}: expected a file that ends with {listing(list(_SUFFIXES))}")
    if output.is_dir():
        raise ConfigurationError(f"{output} is a folder: expected a file to write")
    if not output.absolute().parent.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise ConfigurationError(f"{output}: its folder does not exist, or no file can be written there")
    if isinstance(source, str | Path):
        read, blocks = Path(source).resolve(), blocks_folder(output).resolve()
        if blocks in (read, *read.parents) or any(_is_same(path, read) for path in (output, _unfinished(output))):
            raise ConfigurationError(
                f"the output {output} is the source {source}, or is written over it: give another output"
            )
    return _SUFFIXES[output.suffix.lower()]


def blocks_folder(output: str | Path) -> Path:
    """Return the folder of the blocks of an output file that is not whole yet."""
    output = Path(output)
    return output.with_name(f"{output.name}.parts")


def _unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other or (path.exists() and other.exists() and path.samefile(other))


def write_tables(tables: Iterable[pa.Table], output: str | Path) -> None:
    """Write tables with the same columns, one after the other; the file exists only when it is whole.

    In CSV, the entries of a list have spaces between them, and texts that a spreadsheet would run are escaped by
    `esm_efficient.reporting.tables.format_csv`. Parquet and JSON lines have every text as it is.

    Args:
        tables: at least one table.
        output: a file that ends with .csv, .jsonl or .parquet.

    Raises:
        ConfigurationError: as `written_as`.
        OSError: the file cannot be written; what was written of it is removed.
    """
    output = Path(output)
    write = {"csv": _write_csv, "jsonl": _write_json_lines, "parquet": _write_parquet}[written_as(output)]
    with whole_file(output) as partial:
        write(iter(tables), partial)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes `path` if the block ends well and is removed otherwise."""
    partial = _unfinished(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
