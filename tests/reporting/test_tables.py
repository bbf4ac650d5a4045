"""Tables and numbers as text."""

from __future__ import annotations

import csv
import io

import pytest

from esm_efficient.errors import DataError
from esm_efficient.reporting import format_bytes, format_csv, format_markdown, format_number, format_table


def test_columns_are_aligned_without_trailing_spaces():
    text = format_table([("a", 1, "x"), ("longer", 22, "")], ("name", "n", "note"))
    assert text.splitlines() == ["name    n   note", "------  --  ----", "a       1   x", "longer  22"]


def test_rows_of_different_widths_are_refused():
    with pytest.raises(DataError, match="expected the same number"):
        format_table([("a",), ("b", "c")])
    assert format_table([]) == ""
    for layout in (format_markdown, format_csv):
        with pytest.raises(DataError, match="expected the same number"):
            layout([("a", "b")], ("one",))


def test_csv_reads_back_as_it_was():
    rows = [["a, b", 'say "x"'], ["two\nlines", ""]]
    assert list(csv.reader(io.StringIO(format_csv(rows, ("n", "v"))))) == [["n", "v"], *rows]


def test_markdown_escapes_the_separator_of_cells():
    assert format_markdown([("a|b", 1)], ("n", "v")).splitlines()[-1] == r"| a\|b | 1 |"


def test_an_undefined_number_is_a_dash():
    assert format_number(float("nan"), "{:.2f}") == format_number(None, "{:.2f}") == "-"
    assert format_number(0.0, "{:.2f}") == "0.00"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (123_456_789, "118 MiB"),
        (3_500_000_000, "3.26 GiB"),
        (1000 * 1024, "1,000 KiB"),
        (2**60, "1,048,576 TiB"),
    ],
)
def test_bytes_in_binary_units(count, text):
    assert format_bytes(count) == text
