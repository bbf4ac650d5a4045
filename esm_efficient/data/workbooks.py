"""Rows of an Excel workbook (.xlsx), as text, in the way in which Excel would save the sheet as CSV."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import itertools
import logging
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esm_efficient.data.fasta import LeaveOut
from esm_efficient.data.opening import FREE_BYTES, MAX_RATIO, MAX_ROW_CHARACTERS
from esm_efficient.errors import ConfigurationError, DataError, listing

logger = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
_WORKBOOK = "xl/workbook.xml"
"""The file that every workbook has in it."""

_MOST_CHARACTERS = 32_767
"""Characters of the longest cell of Excel, which cuts longer texts."""

_FORMULA = re.compile(rb"<(?:\w+:)?f[\s/>]")
_CHUNK_BYTES = 1 << 20
_READ_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, SyntaxError, zipfile.BadZipFile, zlib.error)
"""What openpyxl raises for a damaged workbook; an error of the XML parser is a SyntaxError."""


def is_workbook(path: str | Path) -> bool:
    """Return whether a file is an Excel workbook in the format .xlsx, whatever its name.

    Example:
        >>> is_workbook("pyproject.toml")
        False
    """
    if not Path(path).is_file():
        return False
    with open(path, "rb") as handle:
        if handle.read(len(_ZIP)) != _ZIP:
            return False
        try:
            with zipfile.ZipFile(handle) as archive:
                return _WORKBOOK in archive.namelist()
        except zipfile.BadZipFile:
            return False


def read_workbook(
    path: str | Path, *, leave_out: LeaveOut | None = None
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Read the column names and the rows of the only sheet with cells.

    Numbers, dates and truth values become text, as in a CSV. Formulas have the value that Excel has saved. The rows are
    read one by one; the texts of the sheet are in memory.

    Args:
        path: the workbook.
        leave_out: takes rows that cannot be read; None to raise an error.

    Returns:
        The names in the first row that is not empty, and an iterator over the rows below it: the place of each, such as
        ``sheet Table1, row 3``, and its cells. Empty rows are skipped.

    Raises:
        DataError: the file is damaged or unpacks to far more than its size, several sheets have cells, two columns have
            the same name; or a row has a cell without a column name, an error such as ``#N/A``, a text that Excel has
            cut, or a formula without a value.
        ConfigurationError: openpyxl is not installed.
    """
    if importlib.util.find_spec("openpyxl") is None:
        raise ConfigurationError(
            f"{path} is an Excel workbook, which needs openpyxl, not installed here: "
            "pip install 'esm-efficient-finetuning[excel]', or save the sheet as CSV (UTF-8)"
        )
    lines = _lines(path)
    header = next(lines, None)
    if header is None:
        raise DataError(f"{path} is empty: no cell of it has a text or a number")
    names = [cell.strip() for cell in header.cells]
    while names and not names[-1]:
        names.pop()
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise DataError(f"{path}: more than one column is named {listing([name[:40] for name in repeated])}")
    names = [name or f"unnamed {index}" for index, name in enumerate(names)]
    return names, _complete_rows(lines, names, path, leave_out)


class _Line:
    """A row of a sheet that is not empty.

    Attributes:
        place: where it is.
        cells: its cells as text.
        faults: what is wrong with it, with the index of the cell.
        dates: the indices of cells that are dates.
    """

    def __init__(self, place: str, row: Sequence[Any], formulas: Sequence[Any]) -> None:
        self.place, self.cells = place, [_text(cell.value) for cell in row]
        self.faults: list[tuple[int, str]] = []
        self.dates = [index for index, cell in enumerate(row) if isinstance(cell.value, datetime.date)]
        for index, (cell, text) in enumerate(zip(row, self.cells, strict=True)):
            is_formula = index < len(formulas) and formulas[index].data_type == "f"
            if cell.data_type == "e":
                self.faults.append((index, f"is the error {text} of Excel"))
            elif len(text) >= _MOST_CHARACTERS:
                self.faults.append((index, f"has {_MOST_CHARACTERS:,} characters, at which Excel cuts a text"))
            elif cell.value is None and is_formula and cell.data_type != "str":  # "str" has an empty text
                self.faults.append((index, "is a formula without a value: open the file in Excel and save it"))


def _lines(path: str | Path) -> Iterator[_Line]:
    """Yield the rows that are not empty of the only sheet that is not, the first of which has the names."""
    import openpyxl

    with contextlib.ExitStack() as stack:
        stack.enter_context(_readable(path))
        has_formulas = _check_archive(path)
        # openpyxl refuses a path without a suffix of Excel.
        books = [
            openpyxl.load_workbook(stack.enter_context(open(path, "rb")), read_only=True, data_only=values)
            for values in ((True, False) if has_formulas else (True,))
        ]
        for book in books:
            stack.callback(book.close)
        title = _only_sheet(books[0], path)
        sheets = [book[title] for book in books]
        for sheet in sheets:
            sheet.reset_dimensions()  # which some programs write wrongly
        rows = sheets[0].iter_rows()
        formulas = sheets[1].iter_rows() if has_formulas else itertools.repeat(())
        for number, (row, written) in enumerate(zip(rows, formulas, strict=False), 1):
            line = _Line(f"sheet {title}, row {number}", row, written)
            if line.faults or any(cell.strip() for cell in line.cells):
                yield line


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn what openpyxl raises for a damaged file into an error of the library."""
    try:
        yield
    except DataError:
        raise
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as an Excel workbook ({type(error).__name__}: {error})") from error


def _check_archive(path: str | Path) -> bool:
    """Return whether a workbook has formulas.

    Raises:
        DataError: a part of it unpacks to far more than its size.
    """
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.file_size > max(FREE_BYTES, MAX_RATIO * part.compress_size):
                raise DataError(
                    f"{path}: {part.filename} unpacks to more than {MAX_RATIO} times its size, which no table of "
                    "sequences does"
                )
        sheets = [name for name in archive.namelist() if name.startswith("xl/worksheets/")]
        return any(_has_formula(archive, name) for name in sheets)


def _has_formula(archive: zipfile.ZipFile, name: str) -> bool:
    with archive.open(name) as sheet:
        end = b""
        while chunk := sheet.read(_CHUNK_BYTES):
            if _FORMULA.search(end + chunk):
                return True
            end = chunk[-80:]
    return False


def _only_sheet(book: Any, path: str | Path) -> str:
    """Return the name of the only sheet with cells."""
    filled = [sheet.title for sheet in book.worksheets if _has_cells(sheet)]
    if not filled:
        raise DataError(f"{path} is empty")
    if len(filled) > 1:
        raise DataError(
            f"{path} has cells in {len(filled)} sheets ({listing(filled)}): which one is meant? Save that one as CSV "
            "(UTF-8), or remove the others"
        )
    return filled[0]


def _has_cells(sheet: Any) -> bool:
    sheet.reset_dimensions()
    return any(value is not None for row in sheet.iter_rows(values_only=True) for value in row)


def _text(value: Any) -> str:
    """Return the value of a cell as a CSV has it.

    Example:
        >>> [_text(value) for value in (None, "MK", 3, 0.5, True, datetime.date(2024, 9, 2))]
        ['', 'MK', '3', '0.5', 'TRUE', '2024-09-02']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _complete_rows(
    lines: Iterator[_Line], names: Sequence[str], path: str | Path, leave_out: LeaveOut | None
) -> Iterator[tuple[str, list[str]]]:
    """The rows with one cell per column; each cell must have been read whole."""
    dates: dict[int, list[str]] = {}
    texts = [0] * len(names)
    for line in lines:
        for index in line.dates:
            dates.setdefault(index, []).append(line.place)
        for index, cell in enumerate(line.cells[: len(names)]):
            texts[index] += bool(cell.strip()) and index not in line.dates
        cells, extra = line.cells[: len(names)], line.cells[len(names) :]
        problem = ""
        if line.faults:
            index, fault = line.faults[0]
            problem = f"the cell in column {names[index][:40] if index < len(names) else index + 1} {fault}"
        elif any(cell.strip() for cell in extra):
            problem = f"a cell is to the right of the {len(names)} named columns"
        elif sum(map(len, cells)) > MAX_ROW_CHARACTERS:
            problem = f"a row of more than {MAX_ROW_CHARACTERS:,} characters"
        if not problem:
            yield line.place, [*cells, *[""] * (len(names) - len(cells))]
        elif leave_out is None:
            raise DataError(f"{path}, {line.place}: {problem}")
        else:
            leave_out(f"{path}, {line.place}", problem)
    for index, places in dates.items():
        if index < len(names) and texts[index]:  # a column of dates alone is one
            logger.warning(
                "%s: %s of the column %s, which has other texts too: Excel makes dates of names such as SEPT2 or 2-9. "
                "Correct them, and let the column be text: %s",
                *(path, f"{len(places):,} cell(s) are dates", names[index][:40], listing(places)),
            )
