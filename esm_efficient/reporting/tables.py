"""Tables in plain text, Markdown and CSV, and the numbers in them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from esm_efficient.errors import DataError


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Format rows as text in aligned columns; the last column is not padded.

    Args:
        rows: cells, each shown as ``str``; the same number in every row.
        header: names of the columns, which are underlined.

    Raises:
        DataError: the rows have different numbers of cells.

    Example:
        >>> print(format_table([("accuracy", "0.91"), ("MCC", "0.78")], ("metric", "value")))
        metric    value
        --------  -----
        accuracy  0.91
        MCC       0.78
    """
    lines = _cells(rows if header is None else [header, *rows])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if header is not None:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def format_markdown(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Format rows as a Markdown table.

    Raises:
        DataError: the rows have different numbers of cells, or not as many as the header.

    Example:
        >>> print(format_markdown([("MCC", "0.78")], ("metric", "value")))
        | metric | value |
        |---|---|
        | MCC | 0.78 |
    """
    lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in _cells([header, *rows])]
    head, *body = (f"| {line} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(header), *body])


def format_csv(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    r"""Format rows as CSV with a header line, as RFC 4180 says, except that lines end with a newline alone.

    Raises:
        DataError: the rows have different numbers of cells, or not as many as the header.

    Example:
        >>> format_csv([("a, b", 1)], ("name", "value"))
        'name,value\n"a, b",1\n'
    """
    _cells([header, *rows])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def format_number(value: float | None, pattern: str) -> str:
    """Format a number, or return ``"-"`` if it is NaN or None.

    Example:
        >>> format_number(1234.5, "{:,.1f} s"), format_number(float("nan"), "{:.3f}")
        ('1,234.5 s', '-')
    """
    return "-" if value is None or math.isnan(value) else pattern.format(value)


def format_bytes(count: int) -> str:
    """Format a number of bytes in binary units, with three significant digits.

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


def _cells(lines: Sequence[Sequence[object]]) -> list[list[str]]:
    """Return the text of every cell; refuse lines of different lengths."""
    widths = sorted({len(line) for line in lines})
    if len(widths) > 1:
        raise DataError(f"the rows of a table have {' or '.join(map(str, widths))} cells: expected the same number")
    return [[str(cell) for cell in line] for line in lines]
