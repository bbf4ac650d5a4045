"""Plain-text tables."""

from __future__ import annotations

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
    if len({len(row) for row in cells}) > 1:
        raise DataError(f"rows of {sorted({len(row) for row in cells})} cells do not make a table")
    if not cells:
        return ""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    if header is not None:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


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
    return f"{count} B" if units[0] == "B" else f"{size:#.3g} {units[0]}"
