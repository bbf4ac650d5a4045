"""Names of several labels: their spellings, those that may be missing, and those that are two."""

from __future__ import annotations

import re

import pytest
from sequence_files import frame, rows_of, write

from esm_efficient import load_sequences
from esm_efficient.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]


def several(tmp_path, cells, **options):
    table = frame(40).assign(label=[cells[row % len(cells)] for row in range(40)])
    return load_sequences(write(table, tmp_path / "t.csv"), label="label", label_kind="several", **options)


def test_spellings_of_several_labels_are_one_label(tmp_path, caplog):
    data = several(tmp_path, ["Nucleus|Cell membrane", "Nucleus", "nucleus", "cell_membrane|Nucleus", "Cell membrane"])
    assert set(data["train"].features["label"]) == {"Nucleus", "Cell membrane"}
    labels = [row["label"] for _, row in sorted(rows_of(data).items(), key=lambda item: int(item[0][1:]))]
    assert [(label["Nucleus"], label["Cell membrane"]) for label in labels[:5]] == [
        (1, 1),
        (1, 0),
        (1, 0),
        (1, 1),
        (0, 1),
    ]
    assert "read as one label: 'cell_membrane' as 'Cell membrane', 'nucleus' as 'Nucleus'" in caplog.text


@pytest.mark.parametrize("cell", ["NA", "N/A", "|", "-", " | |"])
def test_several_labels_may_be_missing(tmp_path, cell):
    cells = ["a|b", cell, "a", "b"]
    with pytest.raises(DataError, match=r"label may be missing in .*line 3: .*on_error=\"skip\""):
        several(tmp_path, cells)
    data = several(tmp_path, cells, on_error="skip")
    assert set(data["train"].features["label"]) == {"a", "b"}
    assert sum(map(len, data.values())) == 30


def test_a_second_separator_in_the_name_of_a_label_is_refused(tmp_path):
    for cell in ("a;b", "a,b", "c;d"):
        with pytest.raises(DataError, match=rf"seems to be several: .*line 3: '{cell}'. Write \| between all labels"):
            several(tmp_path, ["a|b", cell, "a"])
    data = several(tmp_path, ["a|membrane, inner", "a"])
    assert set(data["train"].features["label"]) == {"a", "membrane, inner"}


def test_a_label_named_as_a_missing_cell_is_warned_of(tmp_path, caplog):
    assert set(several(tmp_path, ["ZN|NA", "ZN"])["train"].features["label"]) == {"ZN", "NA"}
    assert re.search(r"'NA' \(.*line 2\) is read as a label, but may say that one is missing", caplog.text)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_lists_of_missing_labels_are_missing_and_an_empty_text_of_a_list_has_no_label(tmp_path, name):
    table = frame(40).assign(label=[[["a", "b"], [None], ["a"], ["b"]][row % 4] for row in range(40)])
    path = write(table, tmp_path / name)
    with pytest.raises(DataError, match=r"label may be missing in .*(line 3|row 1): .*on_error=\"skip\""):
        load_sequences(path, label="label", label_kind="several")
    data = load_sequences(path, label="label", label_kind="several", on_error="skip")
    assert sum(map(len, data.values())) == 30
    if name == "t.csv":
        data = several(tmp_path, ["['a']", "[]"])
        assert sum(row["label"]["a"] for row in rows_of(data).values()) == 20


@pytest.mark.parametrize("separator", ["|", ";", ", "])
def test_empty_brackets_are_no_label_among_separated_ones(tmp_path, separator):
    data = several(tmp_path, [f"a{separator}b", "[]", "a", "b", "[ ]"])
    rows = list(rows_of(data).values())
    assert all(set(row["label"]) == {"a", "b"} for row in rows)
    assert [sum(row["label"].values()) for row in rows].count(0) == 16


GO = ("transferase activity, phosphorus", "DNA binding", "kinase activity")


@pytest.mark.parametrize(
    ("cells", "rows"),
    [
        ([f"['{GO[0]}', '{GO[1]}']", f"['{GO[2]}']", "[]"], [set(GO[:2]), {GO[2]}, set()]),
        ([f"['{GO[0]}' '{GO[1]}']", f'["{GO[2]}"]'], [set(GO[:2]), {GO[2]}]),
        (["{'a', 'b'}", "{'b'}", "set()"], [{"a", "b"}, {"b"}, set()]),
        (["[a, b]", "a", "b"], [{"a", "b"}, {"a"}, {"b"}]),
        (["[2Fe-2S]|[4Fe-4S]", "[2Fe-2S]", "[4Fe-4S]"], [{"[2Fe-2S]", "[4Fe-4S]"}, {"[2Fe-2S]"}, {"[4Fe-4S]"}]),
        (["[5'-end, 3'-end]", "[5'-end]"], [{"5'-end", "3'-end"}, {"5'-end"}]),
    ],
    ids=["quotes of a list", "quotes without commas", "sets", "lists among names", "names in brackets", "apostrophes"],
)
def test_lists_and_sets_written_as_text_hold_the_names_that_were_in_them(tmp_path, cells, rows):
    data = several(tmp_path, cells)
    found = [row["label"] for _, row in sorted(rows_of(data).items(), key=lambda item: int(item[0][1:]))]
    assert set(found[0]) == set().union(*rows)
    assert [{name for name, value in label.items() if value} for label in found[: len(rows)]] == rows


def test_empty_lists_of_a_table_with_lists_are_sequences_without_any_label(tmp_path):
    lists = [["a", "b"], ["a"], [], ["b"]]
    path = write(frame(40).assign(label=[lists[row % 4] for row in range(40)]), tmp_path / "t.parquet")
    for on_error in ("raise", "skip"):
        data = load_sequences(path, label="label", label_kind="several", on_error=on_error)
        assert [sum(row["label"].values()) for row in rows_of(data).values()].count(0) == 10


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a/b", "a", "b"], "seems to be several: .*line 2: 'a/b'. Write \\| between all labels"),
        (["a & b", "a", "b"], "'a & b'"),
        (["a + b", "a|b", "b"], "'a \\+ b'"),
        (["[a]", "a", "b"], "line 2: '\\[a\\]'"),
    ],
)
def test_names_that_other_marks_divide_into_labels_are_refused(tmp_path, cells, message):
    with pytest.raises(DataError, match=message):
        several(tmp_path, cells)


@pytest.mark.parametrize(
    ("cells", "cure"),
    [
        (["a/b", "a", "b"], "Write | between them and pass label_kind="),
        (["a|b", "a", "b"], ". Pass label_kind="),
        (["{'a', 'b'}", "a", "b"], ". Pass label_kind="),
        (["[]", "a", "b"], ". Pass label_kind="),
    ],
)
def test_the_cure_for_cells_of_several_labels_fits_how_they_are_written(tmp_path, cells, cure):
    table = frame(40).assign(label=[cells[row % 3] for row in range(40)])
    with pytest.raises(DataError, match=f"a cell may hold several labels: .*{re.escape(cure)}"):
        load_sequences(write(table, tmp_path / "t.csv"), label="label")


def test_an_empty_cell_among_several_labels_says_how_to_write_none_of_them(tmp_path):
    with pytest.raises(
        DataError, match=r"the label is missing in 10 row.* may have none of the labels, write \[\] for it"
    ):
        several(tmp_path, ["a|b", "a", "", "b"])


def test_whole_numbers_in_two_spellings_are_one_of_several_labels(tmp_path):
    data = several(tmp_path, ["1|2", "1.0", "2.0|3"])
    assert list(data["train"].features["label"]) == ["1", "2", "3"]
    rows = rows_of(data)
    assert {tuple(name for name, value in row["label"].items() if value) for row in rows.values()} == {
        ("1", "2"),
        ("1",),
        ("2", "3"),
    }


def labelled(tmp_path, cells, **options):
    table = frame(40).assign(label=[cells[row % len(cells)] for row in range(40)])
    return load_sequences(write(table, tmp_path / "t.csv"), label="label", **options)["train"].features["label"]


def test_codes_that_look_like_fractions_are_a_question(tmp_path):
    codes = ["1.10", "3.40", "2.60", "1.1"]
    with pytest.raises(DataError, match=r'1\.1 and 1\.10 are one number in two spellings.*label_kind="class"'):
        labelled(tmp_path, codes)
    assert labelled(tmp_path, codes, label_kind="class").names == sorted(codes)
    assert labelled(tmp_path, ["1.5", "3.25", "2", "2.0"]).dtype == "float32"


def test_a_zero_before_a_number_makes_it_a_code(tmp_path):
    assert labelled(tmp_path, ["01", "1", "02", "2"], label_kind="class").names == ["01", "02", "1", "2"]
    assert labelled(tmp_path, ["1", "1.0", "2", "10"], label_kind="class").names == ["1", "2", "10"]
