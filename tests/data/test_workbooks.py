"""Excel workbooks: the rows of the only sheet with cells, as a CSV has them, or an error that names the row."""

from __future__ import annotations

import datetime
import re
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import make_model
from sequence_files import frame, put, rows_of

from esm_efficient import Predictor, load_deeploc, load_sequences, predict_file
from esm_efficient.cli import main
from esm_efficient.data.readers import kind_of, read_blocks
from esm_efficient.data.workbooks import is_workbook
from esm_efficient.errors import ConfigurationError, DataError

openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:A random split")


def write(path, rows, **sheets):
    """A workbook with some rows in the first sheet and others in sheets with names."""
    book = openpyxl.Workbook()
    book.active.title = "Proteins"
    for name, content in {"Proteins": rows, **sheets}.items():
        sheet = book[name] if name in book.sheetnames else book.create_sheet(name)
        for row in content:
            sheet.append(row)
    book.save(path)
    return path


def blocks_of(path, **options):
    blocks = list(read_blocks(path, **options))
    columns = {name: [cell for block in blocks for cell in block.columns[name]] for name in blocks[0].columns}
    return columns, [place for block in blocks for place in block.places]


def test_cells_are_those_of_the_csv(tmp_path):
    day = datetime.datetime(2024, 9, 2)
    rows = [
        [None],
        [None, " sequence ", "label", "when", "share", "ok"],
        [0, "MKTV", 3, day, 0.1, True],
        [],
        [1, "MALW", None, None, 1e-7, False],
        [2, "M"],
    ]
    path = write(tmp_path / "any name", rows, Empty=[], Blank=[[None, None]])
    assert kind_of(path) == "workbook"
    columns, places = blocks_of(path, rows=2)
    assert columns == {
        "unnamed 0": ["0", "1", "2"],
        "sequence": ["MKTV", "MALW", "M"],
        "label": ["3", "", ""],
        "when": ["2024-09-02T00:00:00", "", ""],
        "share": ["0.1", "1e-07", ""],
        "ok": ["TRUE", "FALSE", ""],
    }
    assert places == [f"sheet Proteins, row {number}" for number in (3, 5, 6)]


@pytest.mark.parametrize("label", ["label", "stability", "structure", ["nucleus", "golgi"]])
def test_a_workbook_is_loaded_as_the_csv_is(tmp_path, table_cache, label):
    table = frame()
    columns = ["id", "sequence", *([label] if isinstance(label, str) else label)]
    table[columns].to_csv(tmp_path / "t.csv", index=False)
    typed = table[columns].copy()
    for name in set(columns) & {"stability", "nucleus", "golgi"}:
        typed[name] = pd.to_numeric(typed[name])
    typed.to_excel(tmp_path / "t.xlsx", index=False)
    found, expected = (load_sequences(tmp_path / f"t.{suffix}", label=label) for suffix in ("xlsx", "csv"))
    assert rows_of(found) == rows_of(expected)
    assert found["train"].features == expected["train"].features


def test_a_second_table_and_deeploc_may_be_workbooks(tmp_path, table_cache, demo_table):
    table = frame()
    table[["id", "sequence"]].to_csv(tmp_path / "t.csv", index=False)
    table[["id", "label"]].to_excel(tmp_path / "labels.xlsx", index=False)
    found = rows_of(load_sequences(tmp_path / "t.csv", labels=tmp_path / "labels.xlsx"))
    names = load_sequences(tmp_path / "t.csv", labels=tmp_path / "labels.xlsx")["train"].features["label"].names
    assert {key: names[row["label"]] for key, row in found.items()} == dict(
        zip(table["id"], table["label"], strict=True)
    )
    pd.read_csv(demo_table).to_excel(tmp_path / "deeploc.xlsx", index=False)
    assert load_deeploc(tmp_path / "deeploc.xlsx")["test"][:] == load_deeploc(demo_table)["test"][:]


def test_the_commands_read_workbooks(tmp_path, tokenizer, capsys):
    frame(7)[["id", "sequence", "label"]].to_excel(tmp_path / "p.xlsx", index=False)
    predictor = Predictor(make_model(num_labels=3, problem_type="regression"), tokenizer)
    predict_file(predictor, tmp_path / "p.xlsx", tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["accession"].tolist() == frame(7)["id"].tolist()
    expected = [prediction.values for prediction in predictor.predict(frame(7)["sequence"])]
    np.testing.assert_allclose(found[list(predictor.task.names)], expected, atol=1e-6)
    assert main(["data", str(tmp_path / "p.xlsx")]) == 0
    assert "7" in capsys.readouterr().out


HEADER = ["id", "sequence", "label"]
FAULTS = {
    "an error": ([HEADER, ["a", "MK", 1], ["b", "MV", "#N/A"]], "row 3: the cell in column label is the error #N/A"),
    "a formula": ([HEADER, ["a", "MK", "=1+1"]], "row 2: the cell in column label is a formula without a value"),
    "a long text": ([HEADER, ["a", "M" * 32_767, 1]], "row 2: the cell in column sequence has 32,767 characters"),
    "a cell outside": ([HEADER, [], ["a", "MK", 1, "note"]], "row 3: a cell is to the right of the 3 named columns"),
    "an error outside": ([HEADER, ["a", "MK", 1, "#REF!"]], "row 2: the cell in column 4 is the error #REF!"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cell_that_is_not_what_was_written_names_its_row(tmp_path, fault):
    rows, message = FAULTS[fault]
    path = write(tmp_path / "t.xlsx", [*rows, ["z", "MW", 0]])
    with pytest.raises(DataError, match=rf"t\.xlsx, sheet Proteins, {message}"):
        list(read_blocks(path))
    left = []
    columns, _ = blocks_of(path, leave_out=lambda place, problem: left.append(f"{place}: {problem}"))
    assert columns["id"][-1] == "z"
    assert len(left) == 1
    assert message in left[0]


def test_a_workbook_without_a_text_is_empty(tmp_path):
    with pytest.raises(DataError, match=r"t\.xlsx is empty"):
        list(read_blocks(write(tmp_path / "t.xlsx", [[" ", "  "]])))


def test_errors_of_labels_name_the_row_of_the_sheet(tmp_path, table_cache):
    put(frame(), "sequence", "MK7").to_excel(tmp_path / "t.xlsx", index=False, sheet_name="Data")
    with pytest.raises(DataError, match="sheet Data, row 4"):
        load_sequences(tmp_path / "t.xlsx", label="label")


def test_several_sheets_are_a_question(tmp_path):
    path = write(tmp_path / "t.xlsx", [HEADER, ["a", "MK", 1]], Notes=[["from the lab"]], Empty=[])
    with pytest.raises(
        DataError, match=r"has cells in 2 sheets \(Proteins, Notes\): which one is meant\? Save that one"
    ):
        list(read_blocks(path))
    path = write(tmp_path / "t.xlsx", [], Data=[HEADER, ["a", "MK", 1]])
    assert blocks_of(path)[1] == ["sheet Data, row 2"]


def test_what_is_no_table_is_refused(tmp_path):
    assert not is_workbook(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        list(read_blocks(write(tmp_path / "empty.xlsx", [])))
    with pytest.raises(DataError, match="more than one column is named label"):
        list(read_blocks(write(tmp_path / "twice.xlsx", [["label", "label"], [1, 2]])))
    with pytest.raises(ConfigurationError, match="header= is for FASTA headers only"):
        list(read_blocks(write(tmp_path / "t.xlsx", [HEADER]), header="(?P<a>.)"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("proteins.csv", "id,sequence\n")
    with pytest.raises(DataError, match="another zip file"):
        list(read_blocks(tmp_path / "other.zip"))


def rewritten(path, change):
    """Write the parts of a workbook again, with another sheet."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name == "xl/worksheets/sheet1.xml" else content)
    return path


def test_a_damaged_workbook_and_one_that_unpacks_to_far_more_are_refused(tmp_path):
    path = write(tmp_path / "t.xlsx", [HEADER, ["a", "MK", 1]])
    with pytest.raises(DataError, match=r"cannot be read as an Excel workbook \(ParseError"):
        list(read_blocks(rewritten(path, lambda content: content[:-40])))
    path = write(tmp_path / "t.xlsx", [HEADER, ["a", "MK", 1]])
    with pytest.raises(DataError, match=r"sheet1\.xml unpacks to more than 200 times its size"):
        list(read_blocks(rewritten(path, lambda content: content + b" " * (1 << 27))))


def test_without_openpyxl_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "t.xlsx", [HEADER, ["a", "MK", 1]])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ConfigurationError, match=r"needs openpyxl, not installed here: pip install 'esm-.*\[excel\]'"):
        list(read_blocks(path))
    assert main(["data", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_formula_whose_saved_value_is_an_empty_text_is_an_empty_cell(tmp_path):
    path = write(tmp_path / "t.xlsx", [HEADER, ["a", "MK", '=IF(1=1,"",1)'], ["b", "MW", 0]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = "xl/worksheets/sheet1.xml"
    parts[name], count = re.subn(
        rb'<c r="C2"[^>]*>(<f>.*?</f>).*?</c>', rb'<c r="C2" t="str">\1<v></v></c>', parts[name]
    )
    assert count == 1
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    columns, _ = blocks_of(path)
    assert columns["label"] == ["", "0"]


def test_an_array_formula_without_a_value_is_refused(tmp_path):
    book = openpyxl.Workbook()
    for row in [HEADER, ["a", "MK", 1], ["b", "MW", 0]]:
        book.active.append(row)
    book.active["C3"] = openpyxl.worksheet.formula.ArrayFormula("C3", "=C2")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(DataError, match="row 3: the cell in column label is a formula without a value"):
        list(read_blocks(tmp_path / "t.xlsx"))


def test_dates_among_texts_are_warned_of(tmp_path, caplog):
    day = datetime.datetime(2024, 9, 2)
    rows = [["id", "made", "sequence"], ["SEPT1", day, "MKT"], [day, day, "MAL"]]
    blocks_of(write(tmp_path / "t.xlsx", rows))
    [record] = caplog.records
    assert re.search(r"1 cell\(s\) are dates of the column id.*SEPT2.*row 3", record.getMessage())
