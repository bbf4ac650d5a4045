"""Rows of CSV and TSV: the separator is found, and an open quote names the line on which its row begins."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from esm_efficient.data.fasta import LeaveOut
from esm_efficient.data.opening import MAX_ROW_CHARACTERS
from esm_efficient.errors import DataError, listing


def read_table(
    handle: IO[str], source: str | Path, *, delimiter: str | None = None, leave_out: LeaveOut | None = None
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    r"""Read the column names and the rows of a CSV or TSV text.

    Args:
        handle: the text, with its own line ends (``newline=""``).
        source: the name of the text in errors, such as its path.
        delimiter: the character between cells; None for the one of tab, comma and semicolon that divides the names
            and the first row into equally many cells.
        leave_out: takes rows with too few or too many cells; None to raise an error.

    Returns:
        The column names, and an iterator over the rows: the place of each, such as ``line 3``, and its cells. Lines of
        white space, and rows of several cells that are all empty, are skipped.

    Raises:
        DataError: the text is empty, two columns have the same name, or a row cannot be parsed.

    Example:
        >>> import io
        >>> names, rows = read_table(io.StringIO("id,sequence\nP1,MKT\n"), "example")
        >>> names, list(rows)
        (['id', 'sequence'], [('line 2', ['P1', 'MKT'])])
    """
    skipped, first = 0, handle.readline()
    while first and not first.strip():
        skipped, first = skipped + 1, handle.readline()
    if not first:
        raise DataError(f"{source} is empty")
    read = [first]
    delimiter = delimiter or _delimiter(read, handle)
    lines = _numbered_lines(itertools.chain(read, handle), source, delimiter, skipped, leave_out)
    names = [name.strip() for name in next(lines)[1]]
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise DataError(f"{source}: more than one column is named {listing([name[:40] for name in repeated])}")
    # pandas writes row numbers into a first column without a name.
    names = [name or f"unnamed {index}" for index, name in enumerate(names)]
    return names, _complete_rows(lines, names, source, leave_out)


def _delimiter(read: list[str], handle: IO[str]) -> str:
    """The separator of a table.

    Args:
        read: the first line; the lines that are read here are added.
        handle: the lines after it.
    """
    size = len(read[0])

    def lines() -> Iterator[str]:
        nonlocal size
        for index in itertools.count():
            if index == len(read):
                line = handle.readline()
                if not line or size > MAX_ROW_CHARACTERS:
                    return
                size += len(line)
                read.append(line)
            yield read[index]

    widths: dict[str, list[int]] = {}
    for delimiter in "\t,;":
        found = widths.setdefault(delimiter, [])
        rows = (cells for cells in csv.reader(lines(), delimiter=delimiter, strict=True) if any(cells))
        with contextlib.suppress(csv.Error):  # the separator is another one, or the row is refused when it is read
            found.extend(len(cells) for cells in itertools.islice(rows, 2))
    equal = [delimiter for delimiter, found in widths.items() if len(set(found)) == 1 and found[0] > 1]
    # A tab is hardly ever in a cell. A comma is more often than not.
    return "\t" if "\t" in equal else max(equal or "\t,;", key=lambda each: (widths[each][:1], read[0].count(each)))


def _numbered_lines(
    text: Iterable[str], source: str | Path, delimiter: str, skipped: int, leave_out: LeaveOut | None
) -> Iterator[tuple[str, list[str]]]:
    """The place and the cells of each line; an error of the parser names the line on which the row begins."""
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for line in text:
            size += len(line)
            if size > MAX_ROW_CHARACTERS:
                raise DataError(
                    f"{source}, line {skipped + begun}: a row of more than {MAX_ROW_CHARACTERS:,} "
                    "characters. Check for a quote that is not closed"
                )
            yield line

    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARACTERS))  # of a cell; by default 131,072
    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    while True:
        size, begun = 0, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            place = f"{source}, line {skipped + begun}"
            # If the row has more than a line, it is unknown which of them are rows of their own.
            if leave_out is None or reader.line_num > begun:
                raise DataError(f"{place}: {error}. Check for a quote that begins here") from error
            leave_out(place, f"the cells cannot be read ({error})")
            continue
        if cells is None:
            return
        if delimiter == "\t" and any("\n" in cell for cell in cells):
            raise DataError(
                f"{source}, line {skipped + begun}: a cell spans several lines. Check for a quote that is not closed"
            )
        yield f"line {skipped + reader.line_num}", cells


def _complete_rows(
    lines: Iterable[tuple[str, list[str]]],
    names: Sequence[str],
    source: str | Path,
    leave_out: LeaveOut | None,
) -> Iterator[tuple[str, list[str]]]:
    """The lines that are not empty; each must have one cell per column."""
    for place, cells in lines:
        is_blank = not any(cell.strip() for cell in cells)
        if is_blank and (len(names) > 1 or not cells):  # the cell of a table of one column was written as it is
            continue
        if len(cells) != len(names):
            if leave_out is not None:
                leave_out(f"{source}, {place}", f"the number of cells is not {len(names)}, the number of columns")
                continue
            cure = "Quote a cell that contains the separator" if len(cells) > len(names) else "Write the missing ones"
            raise DataError(
                f"{source}, {place}: {len(cells)} cells for {len(names)} columns "
                f"({listing([name[:40] for name in names])}). {cure}"
            )
        yield place, cells
