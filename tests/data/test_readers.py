"""Readers: every row of a file is read unchanged, or an error names its place."""

from __future__ import annotations

import csv
import gzip
import io
import lzma

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from esm_efficient.data import readers
from esm_efficient.data.readers import kind_of, read_blocks, read_table
from esm_efficient.errors import DataError

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def rows_of(path, **options):
    """The columns and the places of all blocks."""
    blocks = list(read_blocks(path, **options))
    columns = {name: [cell for block in blocks for cell in block.columns[name]] for name in blocks[0].columns}
    places = [place for block in blocks for place in block.places]
    assert all(len(cells) == len(places) for cells in columns.values())
    return columns, places


CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=12)


@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=12),
    st.sampled_from(",\t;"),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(list(PACKERS)),
    st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, rows, separator, end, mark, packed, size):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("name", "value"), *rows])
    path = tmp_path_factory.mktemp("table") / f"table.csv{packed}"
    path.write_bytes(PACKERS[packed](text.getvalue().encode("utf-8-sig" if mark else "utf-8")))
    kept = [row for row in rows if any(cell.strip() for cell in row)]  # spreadsheets write empty rows at the end
    assume(kept)
    if separator == "\t" and any("\n" in cell for row in kept for cell in row):
        with pytest.raises(DataError, match="spans several lines"):
            list(read_blocks(path))
        return
    columns, places = rows_of(path, rows=size)
    assert list(zip(columns["name"], columns["value"], strict=True)) == kept
    assert len(set(places)) == len(kept)


@pytest.mark.parametrize("packed", PACKERS)
def test_fasta_records_are_read_with_accessions_and_places(tmp_path, packed):
    text = ">sp|P12345|NAME_HUMAN A protein\nMKTV\nAY\n\n>plain words\r\nMK\r\n>a|b\nM K\n>\nMV\n"
    path = tmp_path / "sequences"
    path.write_bytes(PACKERS[packed](text.encode()))
    columns, places = rows_of(path, rows=2)
    assert columns["accession"] == ["P12345", "plain", "a|b", ""]
    assert columns["sequence"] == ["MKTVAY", "MK", "MK", "MV"]
    assert columns["header"][1] == "plain words"
    assert places == ["record 1 (P12345)", "record 2 (plain)", "record 3 (a|b)", "record 4 ()"]


def test_parquet_values_are_read_unchanged(tmp_path):
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.table({"sequence": ["MK", "MV", None], "label": [[0, 1], [1], None]}), path)
    columns, places = rows_of(path, rows=2)
    assert columns == {"sequence": ["MK", "MV", None], "label": [[0, 1], [1], None]}
    assert places == ["row 0", "row 1", "row 2"]


def test_the_format_of_a_file_follows_from_its_content(tmp_path):
    for content, kind in (
        (b"\n\n>a\nMK\n", "fasta"),
        (b"sequence\nMK\n", "table"),
        (b"; note\n>a\nMK\n", "fasta"),
        (b";a;b\n0;1;2\n", "table"),
        (b'\n{"sequence": "MK"}\n', "json"),
    ):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"a,b\n1\n", r"line 2: 1 cells for 2 columns \(a, b\)"),
        (b"a,b\n1,2\n  \n1,2,3\n", "line 4: 3 cells"),
        (b"\n \na,b\n1\n", "line 4: 1 cells"),
        (b'a,b\n1,"2\n3,4\n5,6\n', "line 2: .*unexpected end of data.*Check for a quote that begins here"),
        (b'a,b\n1,"2"3\n', "line 2:"),
        (b"a,a\n1,2\n", "more than one column is named a"),
        (gzip.compress(b"a,b\n" + b"1,2\n" * 9999, mtime=0)[:-20], "EOFError"),
        (b"\x1f\x8b\x08nonsense", "cannot be read"),
        (b"\xfd7zXZ\x00nonsense", "LZMAError"),
        (b"PAR1nonsense", "as Parquet"),
        (b"a,b\n" + b"M" * 5_000_000 + b",1\n", "has a line of more than 4,194,304 characters"),
        (b'a\tb\n1\t"2\n3\t4"\n', "line 2: a cell spans several lines"),
        (b'{"a": 1}\n{"a": 2\n', r"line 2: the line is not JSON .*one object per line \(JSON lines\)"),
        (b'{"a": 1}\n[2]\n', "line 2: the line is not a JSON object"),
        (b'{\n  "a": 1\n}\n', "line 1: the line is not JSON"),
        (b'{"a": "x"}\n{"a": "\\udc00"}\n', r"line 2: '\\udc00' is half of a character"),
        (b"{" * 100_000 + b"\n", "line 1: the line is not JSON"),
    ],
)
def test_an_error_names_the_place_that_cannot_be_parsed(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_blocks(path))


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"no file at .*absent"):
        list(read_blocks(tmp_path / "absent.csv"))


@pytest.mark.parametrize("packed", PACKERS)
def test_json_lines_are_read_with_their_values(tmp_path, packed):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PACKERS[packed](b'{"sequence": "MK", "label": [0, 1]}\n\n{"sequence": "MV"}\n{"label": 0.5}\n'))
    columns, places = rows_of(path, rows=2)
    assert columns == {"sequence": ["MK", "MV", None], "label": [[0, 1], None, 0.5]}
    assert places == ["line 1", "line 3", "line 4"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,b\n1,2\n1\n1,2\n", "the number of cells is not 2"),
        (b'{"a": 1, "b": 2}\n[]\n{"a": 1, "b": 2}\n', "not a JSON object"),
        (b'{"a": 1, "b": 2}\n{"a"\n{"a": 1, "b": 2}\n', "not JSON"),
    ],
)
def test_rows_that_cannot_be_parsed_can_be_left_out(tmp_path, content, problem):
    path = tmp_path / "file"
    path.write_bytes(content)
    left_out = []
    columns, _ = rows_of(path, leave_out=lambda *row: left_out.append(row))
    assert [str(cell) for cell in columns["b"]] == ["2", "2"]
    ((place, found),) = left_out
    assert place.endswith(("line 2", "line 3"))
    assert problem in found


@pytest.mark.parametrize(
    ("text", "names", "cells"),
    [
        ('id,sequence,"a;b;c;d"\nP1,MK,x\n', ["id", "sequence", "a;b;c;d"], ["P1", "MK", "x"]),
        ("id\tNote (a, b, c, d)\nP1\tx\n", ["id", "Note (a, b, c, d)"], ["P1", "x"]),
        ("id\tNote (a, b, c)\nP1\tx, y, z\n", ["id", "Note (a, b, c)"], ["P1", "x, y, z"]),
        ("id;x\nP1;0,5\n", ["id", "x"], ["P1", "0,5"]),
        ("id,x\nP1,0;5\n", ["id", "x"], ["P1", "0;5"]),
        ('"two\nlines",x\nP1,2\n', ["two\nlines", "x"], ["P1", "2"]),
        ("sequence\nM,K\n", ["sequence"], ["M,K"]),
        ("id,x\n", ["id", "x"], None),
        ("\n;id;x\n\n1;P1;a,b\n", ["unnamed 0", "id", "x"], ["1", "P1", "a,b"]),
    ],
)
def test_the_separator_divides_the_names_and_the_first_row_into_equally_many_cells(text, names, cells):
    found, rows = read_table(io.StringIO(text, newline=""), "example")
    assert found == names
    assert [row for _, row in rows] == ([] if cells is None else [cells])


def test_a_row_with_a_stray_quote_is_left_out_but_an_open_quote_is_an_error(tmp_path):
    path, left_out = tmp_path / "t.tsv", []
    path.write_text('id\tname\nP1\t"Hsp70" protein\nP2\tx\n')
    with pytest.raises(DataError, match=r"t.tsv, line 2: .*Check for a quote"):
        list(read_blocks(path))
    (block,) = read_blocks(path, leave_out=lambda *row: left_out.append(row[0]))
    assert (block.columns["id"], left_out) == (["P2"], [f"{path}, line 2"])
    path.write_text('id\tname\nP1\tx\nP2\t"Hsp70\nP3\tx\nP4\tx\n')
    with pytest.raises(DataError, match=r"t.tsv, line 3: .*Check for a quote"):
        list(read_blocks(path, leave_out=lambda *row: left_out.append(row[0])))


def test_keys_of_json_lines_may_be_absent_from_the_first_object(tmp_path, monkeypatch):
    path, left_out = tmp_path / "t.jsonl", []
    path.write_text('{"a": 1}\n{"a": 2, "b": 3}\n{"a": 4, "c": 5}\n')
    (block,) = read_blocks(path)
    assert block.columns == {"a": [1, 2, 4], "b": [None, 3, None], "c": [None, None, 5]}
    monkeypatch.setattr(readers, "BLOCK_ROWS", 2)
    with pytest.raises(DataError, match=r"line 3: the key\(s\) c are not in the first 2 objects"):
        list(read_blocks(path))
    (block,) = read_blocks(path, leave_out=lambda *row: left_out.append(row[0]))
    assert (block.columns, left_out) == ({"a": [1, 2], "b": [None, 3]}, [f"{path}, line 3"])


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "t.csv").write_text(f"id,structure\na,{'H' * 200_000}\n")
    [block] = read_blocks(tmp_path / "t.csv")
    assert [len(cell) for cell in block.columns["structure"]] == [200_000]


def test_a_key_that_is_twice_in_an_object_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"sequence": "MKT", "label": "a", "label": "b"}\n')
    with pytest.raises(DataError, match=r"line 1: the line is not JSON \(the key 'label' is there twice\)"):
        list(read_blocks(path))
