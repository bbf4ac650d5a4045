"""Tables and numbers as text."""

from __future__ import annotations

import csv
import io

import pytest

from esm_efficient.errors import DataError
from esm_efficient.reporting import (
    escape_markdown,
    file_name,
    format_bytes,
    format_csv,
    format_markdown,
    format_number,
    format_table,
)


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
    rows = [["a, b", 'say "x"'], ["two\nlines", ""], ["-1.5", "-"], ["+3", "-2,000"], ["-0.5 1e-05 -2", "- -1"]]
    rows += [["+", "- - H - H"], ["+ - -", "- coil alpha/beta H.1"]]  # labels of residues
    assert list(csv.reader(io.StringIO(format_csv(rows, ("n", "v"))))) == [["n", "v"], *rows]


def test_markdown_escapes_the_separator_of_cells():
    assert format_markdown([("a|b", 1)], ("n", "v")).splitlines()[-1] == r"| a\|b | 1 |"


NAMES = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3+cmd", "@SUM(A1)", " =1+1", "\t=1+1"]
NAMES += ["-a", "+A1", "-(1)", "- cmd|' /C calc'!A0", '+ HYPERLINK("x")', "- 'b'!B1", "\rtext", "-1,=A1", "--A1"]


@pytest.mark.parametrize("name", NAMES)
def test_csv_has_no_formula(name):
    read = list(csv.reader(io.StringIO(format_csv([(name, -1.5)], (name, "value")))))
    assert read == [[f"'{name}", "value"], [f"'{name}", "-1.5"]]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\\nb"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:1)", r"\[x\](javascript:1)"),
        ("![x](http://a/b.png)", r"!\[x\](http:&#8203;//a/b.png)"),
        ("`code`", r"\`code\`"),
        ("&amp;", "&amp;amp;"),
        ("f1_non-membrane", "f1_non-membrane"),
        ("__init__", r"\_\_init\_\_"),
        ("$x$", r"\$x\$"),
        ("\x1b[31m", r"\\x1b\[31m"),
        ("right\u202eleft", r"right\\u202eleft"),
        ("Lysosome/Vacuole", "Lysosome/Vacuole"),
        ("https://evil/x", "https:&#8203;//evil/x"),
        ("WWW.evil.com", "WWW.&#8203;evil.com"),
        ("@user a@b.c", "@&#8203;user a@&#8203;b.c"),
        ("alpha:beta", "alpha:beta"),
    ],
)
def test_markdown_shows_a_name_as_it_is(name, shown):
    assert escape_markdown(name) == shown
    assert format_markdown([(name, 1)], ("n", "v")).splitlines()[2:] == [f"| {shown} | 1 |"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("# x", r"\# x"),
        ("###### x", r"\###### x"),
        ("#", r"\#"),
        ("- x", r"\- x"),
        ("-", r"\-"),
        ("+ x", r"\+ x"),
        ("1. x", r"1\. x"),
        ("23) x", r"23\) x"),
        ("---", r"\---"),
        ("==", r"\=="),
        ("    x", "x"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("#tag", "#tag"),
        ("1.5", "1.5"),
        ("-x", "-x"),
    ],
)
def test_a_name_at_the_start_of_a_line_begins_no_heading_or_list(name, shown):
    assert escape_markdown(name) == shown


def test_a_table_for_a_terminal_has_no_control_characters():
    text = format_table([("a\nb\x1b[31m\u202e", "1")], ("n\r", "v"))
    assert text.splitlines()[2] == r"a\nb\x1b[31m\u202e  1"
    assert text.count("\n") == 2
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "_._.._etc_passwd"),
        ("..", "_."),
        ("/", "_"),
        ("", "_"),
        ("a\nb\0", "a_b_"),
        ("C:\\x", "C__x"),
        ("-rf", "_rf"),
        ("lora", "lora"),
        ("lora-r8_v1.2", "lora-r8_v1.2"),
        ("Ä" * 300, "_" * 100),
    ],
)
def test_a_file_name_is_one_component_of_a_path(tmp_path, text, name):
    assert file_name(text) == name
    assert (tmp_path / name).resolve().parent == tmp_path


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
