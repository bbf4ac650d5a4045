"""Tables in plain text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from esm_efficient.errors import DataError


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Lay rows out in aligned columns; the last column is not padded.

    Args:
        rows: cells, each shown as ``str``; all rows have as many.
        header: names of the columns, underlined.

    Raises:
        DataError: the rows have different numbers of cells.

    Example:
        >>> print(format_table([("accuracy", "0.91"), ("MCC", "0.78")], ("metric", "value")))
        metric    value
        --------  -----
        accuracy  0.91
        MCC       0.78
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if header is not None:
        cells.insert(0, list(header))
    if not cells:
        return ""
    _check_widths(cells[1:], cells[0])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    if header is not None:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def format_markdown(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Lay rows out as a Markdown table.

    Raises:
        DataError: the rows have not as many cells as the header.

    Example:
        >>> print(format_markdown([("MCC", "0.78")], ("metric", "value")))
        | metric | value |
        |---|---|
        | MCC | 0.78 |
    """
    _check_widths(rows, header)
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in cells)


def format_csv(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    r"""Lay rows out as CSV with a header line (RFC 4180, but for newlines alone as line ends).

    Raises:
        DataError: the rows have not as many cells as the header.

    Example:
        >>> format_csv([("a, b", 1)], ("name", "value"))
        'name,value\n"a, b",1\n'
    """
    _check_widths(rows, header)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def format_bytes(count: int) -> str:
    """A number of bytes in binary units, with three significant digits.

    Example:
        >>> format_bytes(3_500_000_000)
        '3.26 GiB'
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    if units[0] == "B":
        return f"{count} B"
    return f"{f'{size:,.0f}' if size >= 99.95 else f'{size:#.3g}'} {units[0]}"


def _check_widths(rows: Sequence[Sequence[object]], header: Sequence[object]) -> None:
    widths = sorted({len(header), *(len(row) for row in rows)})
    if len(widths) > 1:
        raise DataError(f"rows of {widths} cells do not make a table")
