"""The kind of label follows from the cells, or an error says why it does not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, List, Value
from pyarrow import parquet
from sequence_files import frame, rows_of, write
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_sequences, tokenize_dataset
from esm_efficient.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]


@pytest.mark.parametrize(
    ("options", "feature", "expected"),
    [
        (
            {"label": "label"},
            ClassLabel(names=["membrane", "soluble"]),
            lambda row: ("membrane", "soluble").index(row.label),
        ),
        ({"label": "stability"}, Value("float32"), lambda row: pytest.approx(float(row.stability))),
        ({"label": "golgi"}, ClassLabel(names=["0", "1"]), lambda row: int(float(row.golgi))),
        (
            {"label": "structure"},
            List(ClassLabel(names=["E", "H"])),
            lambda row: ["EH".index(c) for c in row.structure],
        ),
        ({"label": "fold", "label_kind": "class"}, ClassLabel(names=list("01234")), lambda row: row.fold),
        ({"label": "fold", "label_kind": "number"}, Value("float32"), lambda row: float(row.fold)),
        (
            {"label": ["nucleus", "golgi"]},
            {"nucleus": Value("float32"), "golgi": Value("float32")},
            lambda row: {"nucleus": float(row.nucleus) if row.nucleus else None, "golgi": float(row.golgi)},
        ),
        (
            {"label": {"N": "nucleus"}},
            {"N": Value("float32")},
            lambda row: {"N": float(row.nucleus) if row.nucleus else None},
        ),
    ],
)
def test_the_cells_tell_the_kind_of_label(tmp_path, options, feature, expected):
    table = frame()
    data = load_sequences(write(table, tmp_path / "a.csv"), **options)
    assert data["train"].features["label"] == feature
    rows = rows_of(data)
    assert len(rows) == len(table)
    for row in table.itertuples():
        assert rows[row.id]["label"] == expected(row)


def test_lists_and_numbers_of_a_parquet_file(tmp_path):
    table = frame()
    columns = {"id": table.id, "sequence": table.sequence, "label": [[len(s) % 2] * len(s) for s in table.sequence]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load_sequences(tmp_path / "a.parquet")
    assert data["train"].features["label"] == List(ClassLabel(names=["0", "1"]))
    with pytest.raises(DataError, match=r"list in every row.*needs one value per row"):
        load_sequences(tmp_path / "a.parquet", label_kind="class")
    parquet.write_table(pa.table(columns | {"label": np.linspace(0, 1, len(table))}), tmp_path / "b.parquet")
    assert load_sequences(tmp_path / "b.parquet")["train"].features["label"] == Value("float32")


def test_one_wrong_row_does_not_turn_residue_labels_into_classes_of_sequences(tmp_path):
    table = frame()
    table.loc[5, "structure"] = table.loc[5, "structure"][1:]
    with pytest.raises(DataError, match=r"most labels have one letter.*line 7"):
        load_sequences(write(table, tmp_path / "a.csv"), label="structure")


def test_list_labels_keep_nulls_and_refuse_numbers(tmp_path):
    table = frame()
    columns = {"id": table.id, "sequence": table.sequence}
    labels = [[None, *[len(s) % 2] * (len(s) - 1)] for s in table.sequence]
    parquet.write_table(pa.table(columns | {"label": labels}), tmp_path / "a.parquet")
    data = load_sequences(tmp_path / "a.parquet")
    assert data["train"].features["label"] == List(ClassLabel(names=["0", "1"]))
    assert all(label[0] is None and None not in label[1:] for label in data["train"]["label"])
    tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    assert all(label[:2] == [-100, -100] for label in tokenized["train"]["labels"])
    numbers = [np.linspace(0, 1, len(s)).tolist() for s in table.sequence]
    parquet.write_table(pa.table(columns | {"label": numbers}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="numbers per residue are not supported"):
        load_sequences(tmp_path / "b.parquet")
    table["stability"] = "1e40"
    with pytest.raises(DataError, match=r"not a finite number in .*line 2"):
        load_sequences(write(table, tmp_path / "c.csv"), label="stability", label_kind="number")
