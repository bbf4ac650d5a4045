"""Tables in plain text, Markdown and CSV, the numbers in them, and texts of unknown origin made safe for each.

Names of labels, recipes and data sets come from files of other people. They may contain line breaks, codes that move
the cursor of a terminal, HTML, a formula of a spreadsheet, or parts of a path.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from esm_efficient.errors import DataError

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: controls, formats such as a change of the direction of writing, half characters, line breaks."""

_FORMULA = ("=", "@")
_SIGNS = ("+", "-")
_NUMBER = r"(?:[+-]?[\d.,]+(?:e[+-]?\d+)?|-)"
"""A number as text, or the dash for a missing one."""

_NUMBERS = re.compile(rf"{_NUMBER}(?: {_NUMBER})*", re.IGNORECASE)
"""One number, or the numbers of a list with spaces between them, as of an embedding."""

_SIGN_WORDS = re.compile(r"[+-](?: [\w.+/-]*)*")
"""A plus or minus alone, or words after it with spaces between them, as the labels of residues: no call, no reference
to another file or program, and no operand directly behind the sign."""

_BLOCK_START = re.compile(r"^(\d{1,9}(?=[.)](?: |$))|(?=(?:#{1,6}|[-+])(?: |$)|[-=]+ *$))")
"""Where a text would begin a heading, a list or a rule of Markdown: before a sign, or behind a number."""


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Format rows as text in aligned columns; the last column is not padded, and control characters are shown as codes.

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
    lines = [[one_line(cell) for cell in line] for line in _cells(rows if header is None else [header, *rows])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if header is not None:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def format_markdown(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Format rows as a Markdown table; the cells are escaped as by `escape_markdown`.

    Raises:
        DataError: the rows have different numbers of cells, or not as many as the header.

    Example:
        >>> print(format_markdown([("MCC", "0.78")], ("metric", "value")))
        | metric | value |
        |---|---|
        | MCC | 0.78 |
    """
    lines = [" | ".join(map(_escape_inline, line)) for line in _cells([header, *rows])]
    head, *body = (f"| {line} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(header), *body])


def format_csv(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    r"""Format rows as CSV with a header line, as RFC 4180 says, except that lines end with a newline alone.

    A text that a spreadsheet would run as a formula gets an apostrophe before it. Such a text begins with ``=``, ``@``,
    a tab or a carriage return, or with ``+`` or ``-`` directly before something else. Numbers, lists of numbers, and a
    ``+`` or ``-`` that stands alone or before a space and plain words stay as they are.

    Raises:
        DataError: the rows have different numbers of cells, or not as many as the header.

    Example:
        >>> format_csv([("a, b", 1)], ("name", "value"))
        'name,value\n"a, b",1\n'
    """
    _cells([header, *rows])
    lines = []
    for row in (header, *rows):
        buffer = io.StringIO(newline="")
        # Python before 3.13 quotes a carriage return only if it is in the line terminator.
        csv.writer(buffer, lineterminator="\r\n").writerow(map(_without_formula, row))
        lines.append(buffer.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def one_line(text: object) -> str:
    r"""Return a text with its control characters, line breaks and invisible characters as codes.

    Example:
        >>> one_line("two\nlines")
        'two\\nlines'
    """
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _INVISIBLE else character
        for character in str(text)
    )


def escape_markdown(text: object) -> str:
    r"""Return a text that Markdown shows as it is, on one line, with no HTML, links, mentions or formulas.

    At the start of a line or of an item it begins no heading, list or rule. An address and the name of a user, which
    GitHub would link, get an invisible space of no width inside.

    Example:
        >>> escape_markdown("<b>|*bold*"), escape_markdown("# www.a.org")
        ('&lt;b&gt;\\|\\*bold\\*', '\\# www.&#8203;a.org')
    """
    return _BLOCK_START.sub(r"\1\\", _escape_inline(text).strip(" "))


def _escape_inline(text: object) -> str:
    """As `escape_markdown`, for a text that is not at the start of a line."""
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(:(?=//)|\bwww\.|@)", r"\1&#8203;", escaped, flags=re.IGNORECASE)


def file_name(text: object) -> str:
    """Return a text as one component of a path: other characters than letters, digits, ``.``, ``-`` and ``_`` become _.

    Example:
        >>> file_name("../../etc/passwd"), file_name("Cell membrane")
        ('_._.._etc_passwd', 'Cell_membrane')
    """
    name = re.sub(r"[^\w.-]", "_", str(text), flags=re.ASCII)[:100]
    return re.sub(r"^[.-]", "_", name) or "_"


def format_number(value: float | None, pattern: str) -> str:
    """Format a number, or return ``"-"`` if it is NaN or None.

    Example:
        >>> format_number(1234.5, "{:,.1f} s"), format_number(float("nan"), "{:.3f}")
        ('1,234.5 s', '-')
    """
    return "-" if value is None or math.isnan(value) else pattern.format(value)


def finite_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record for JSON, in which a number that is not finite is None.

    Example:
        >>> finite_values({"mcc": float("nan"), "steps": 4})
        {'mcc': None, 'steps': 4}
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


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


def count_of(number: float, noun: str) -> str:
    """Format a number of things in words; the plural of the noun ends with s.

    Example:
        >>> count_of(1, "epoch"), count_of(2.5, "epoch"), count_of(2_000_000, "row")
        ('1 epoch', '2.5 epochs', '2,000,000 rows')
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def format_seconds(seconds: float | None) -> str:
    """Format a time in the unit that suits it, with three significant digits; ``"-"`` if it is NaN or None.

    Example:
        >>> [format_seconds(seconds) for seconds in (0.0526, 80.5, 186, 6600, 400_000)]
        ['52.6 ms', '80.5 s', '3.1 min', '110 min', '4.63 days']
    """
    if seconds is None or math.isnan(seconds):
        return "-"
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds / 86_400:,.3g} days"


def _without_formula(cell: object) -> object:
    """Return a cell; a text that a spreadsheet would run, as `format_csv` says, gets an apostrophe before it."""
    if not isinstance(cell, str):
        return cell
    text = cell.lstrip()
    runs = text.startswith(_FORMULA) or cell.startswith(("\t", "\r"))
    signed = text.startswith(_SIGNS) and not (_NUMBERS.fullmatch(cell) or _SIGN_WORDS.fullmatch(cell))
    return f"'{cell}" if runs or signed else cell


def _cells(lines: Sequence[Sequence[object]]) -> list[list[str]]:
    """Return the text of every cell; refuse lines of different lengths."""
    widths = sorted({len(line) for line in lines})
    if len(widths) > 1:
        raise DataError(f"the rows of a table have {' or '.join(map(str, widths))} cells: expected the same number")
    return [[str(cell) for cell in line] for line in lines]


def format_duration(seconds: float) -> str:
    """Return a time as a person says it.

    Example:
        >>> format_duration(42.3), format_duration(150), format_duration(9000)
        ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
