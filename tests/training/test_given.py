"""Data of every kind that users have become the same labelled splits."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sequence_files import frame

from esm_efficient import RECIPES, demo_model_path, finetune
from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.training.given import command_words, splits_from, task_of_splits
from esm_efficient.training.job import begin_job

pytestmark = pytest.mark.filterwarnings("ignore:A random split")


def table() -> pd.DataFrame:
    return frame(40)[["id", "sequence", "label"]]


@pytest.fixture
def path(tmp_path):
    table().to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    "give",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: table(),
        lambda path: Dataset.from_pandas(table()),
        lambda path: (table()["sequence"].tolist(), table()["label"].tolist()),
        lambda path: (table()["sequence"], table()["label"].to_numpy()),
        lambda path: Dataset.from_pandas(table()).class_encode_column("label"),
    ],
    ids=["path", "text", "frame", "dataset", "lists", "columns", "encoded"],
)
def test_the_same_rows_give_the_same_splits(path, give):
    splits = splits_from(give(path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    labels = splits["train"].features["label"]
    truth = dict(zip(table()["sequence"], table()["label"], strict=True))
    for split in splits.values():
        for sequence, label in zip(split["sequence"], split["label"], strict=True):
            assert labels.int2str(label) == truth[sequence]


def test_splits_are_returned_as_they_are():
    splits = splits_from(table())
    assert splits_from(splits) is splits
    assert isinstance(splits_from(dict(splits)), DatasetDict)


@pytest.mark.parametrize(
    "give",
    [
        lambda rows: rows,
        lambda rows: Dataset.from_pandas(rows),
        lambda rows: Dataset.from_pandas(rows).rename_column("sequence", "seq").class_encode_column("label"),
        lambda rows: (rows["sequence"].tolist(), rows["label"].tolist()),
    ],
    ids=["frames", "texts", "classes", "lists"],
)
def test_splits_of_any_kind_are_read_together(give):
    rows = table()
    parts = {"train": rows[:30], "test": rows[30:].reset_index(drop=True)}
    splits = splits_from({name: give(part) for name, part in parts.items()})
    labels = splits["train"].features["label"]
    assert labels == splits["test"].features["label"]
    for name, part in parts.items():
        truth = dict(zip(part["sequence"], part["label"], strict=True))
        found = zip(splits[name]["sequence"], splits[name]["label"], strict=True)
        assert {sequence: labels.int2str(label) for sequence, label in found} == truth


def test_whole_numbers_of_a_data_set_are_read_as_those_of_a_table_are():
    rows = table().assign(label=[0, 1] * 20)
    splits = splits_from(DatasetDict(train=Dataset.from_pandas(rows[:30]), test=Dataset.from_pandas(rows[30:])))
    assert splits["test"].features["label"].names == ["0", "1"]


def test_the_named_index_of_a_frame_is_a_column():
    splits = splits_from(table().set_index("id"))
    assert set(splits["test"]["accession"]) <= set(table()["id"])


def test_the_demo_is_a_name():
    assert splits_from("demo")["train"].features["label"].names == ["non-membrane", "membrane"]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ((["MKT"], ["a", "b"]), {}, DataError, "1 sequences and 2 labels"),
        (["MKT", "MAL"], {}, ConfigurationError, "type list: expected a path"),
        (7, {}, ConfigurationError, "type int"),
        ({"train": 7}, {}, ConfigurationError, "got the split 'train' of the type int: expected a path, a DataFrame"),
        ({}, {}, ConfigurationError, "got no split: expected the path of a file"),
        ({"train": table(), "test": (["MK1"], ["a"])}, {}, DataError, "the test lists, row 0"),
        ({"train": table(), "dev": table()}, {}, ConfigurationError, "files for dev: expected train, validation and"),
        ("no/such.csv", {}, DataError, "no file at no/such.csv"),
        (([None, "MKT"], ["a", "b"]), {}, DataError, "the lists, row"),
    ],
)
def test_other_data_are_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        splits_from(data, **options)


def test_options_for_splits_that_exist_are_refused():
    splits = splits_from(table())
    with pytest.raises(ConfigurationError, match="have splits already: remove test_size"):
        splits_from(splits, test_size=0.5)
    with pytest.raises(ConfigurationError, match="label: the labels of this Dataset have a type"):
        splits_from(Dataset.from_pandas(table()).class_encode_column("label"), label="label")


def test_a_number_has_the_name_of_the_column_that_the_user_named(tmp_path):
    features = splits_from(table().assign(Tm=range(40)), label="Tm", label_kind="number")["train"].features
    assert task_of_splits(features, "Tm").names == ("Tm",)
    assert task_of_splits(features).names == ("label",)
    options = {"task": None, "precision": "float32", "training_options": {}, "early_stopping": None, "seed": 0}
    columns = {"label": "Tm", "label_kind": "number"}
    data = table().assign(Tm=range(40))
    job = begin_job(demo_model_path(), data, RECIPES["lora"], tmp_path, data_options=columns, **options)
    assert job.task.names == ("Tm",)
    classes = splits_from(table())["train"].features
    assert task_of_splits(classes, "label").names == tuple(classes["label"].names)


def test_options_of_a_named_table_that_no_command_has_give_no_words():
    assert command_words("demo", {"task": "membrane"}, "8M") == ()
    assert command_words("demo", {"label": None}, "8M", max_tokens=1024) == ("demo", "--model", "8M")
    assert command_words("demo", {}, "8M", max_tokens=52) == ("demo", "--max-tokens", "52", "--model", "8M")


@pytest.mark.parametrize("kind", ["classes", "several labels"])
def test_a_label_without_a_training_example_is_refused_before_a_model_is_loaded(tmp_path, kind):
    names = ["a", "b", "c"]
    feature = ClassLabel(names=names) if kind == "classes" else {name: Value("float32") for name in names}
    features = Features({"sequence": Value("string"), "label": feature})
    ids = [0, 1, 2] if kind == "classes" else [{name: float(name == own) for name in names} for own in names]
    train, test = (
        Dataset.from_dict({"sequence": ["MKV"] * 4, "label": [ids[0], *[ids[place]] * 3]}, features=features)
        for place in (2, 1)
    )
    with pytest.raises(DataError, match=r"no training example has the label b.*class_weights=None"):
        finetune(str(tmp_path / "no model"), DatasetDict(train=train, test=test), output_dir=tmp_path)


def test_a_column_with_cells_of_several_types_is_read_as_text():
    rows = table()
    mixed = rows.assign(number=[10, "10A", None, 1.5] * 10, digest=[2**100 + row for row in range(40)])
    assert sum(map(len, splits_from(mixed, label="label").values())) == 40
    with pytest.raises(DataError, match=r"the label is a number in the DataFrame, row \d+: '0', but not in"):
        splits_from(rows.assign(label=["yes", 0] * 20), label="label")


def test_a_frame_is_written_to_the_cache_once_and_its_rows_are_named_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path))
    first = splits_from(table()[["sequence", "label"]], label="label")
    files = sorted(tmp_path.rglob("*"))
    splits_from(table()[["sequence", "label"]], label="label")
    splits_from("demo")
    with_demo = sorted(tmp_path.rglob("*"))
    splits_from("demo")
    assert sorted(tmp_path.rglob("*")) == with_demo
    assert set(files) < set(with_demo)
    with pytest.raises(DataError, match="the DataFrame has several columns of the name label"):
        splits_from(pd.concat([table(), table()[["label"]]], axis=1))
    assert len([file for file in files if file.name == "DataFrame"]) == 1
    assert all(re.fullmatch(r"DataFrame, row \d+", name) for name in first["test"]["accession"])


def test_columns_that_parquet_cannot_have_become_text():
    rows = table()
    numbers = np.arange(40)
    odd = rows.assign(
        bin=pd.cut(numbers, 2, labels=None),
        day=pd.period_range("2020", periods=40, freq="D"),
        empty=[{}] * 40,
        mixed=[{"a": 1} if row % 2 else {} for row in numbers],
        phase=1j * numbers,
    )
    assert sum(map(len, splits_from(odd).values())) == 40
    assert splits_from(odd, label="bin")["train"].features["label"].names == sorted(map(str, odd["bin"].cat.categories))


def test_notes_on_a_table_that_is_no_file_do_not_name_one(caplog):
    splits_from(table().assign(label=[None, *["a", "b"] * 19, "a"]), on_error="skip")
    assert "left out 1 row(s), the label is missing: the DataFrame, row 0: 'None'" in caplog.text
    assert "parquet" not in caplog.text


@pytest.mark.parametrize("give", [lambda path: path, lambda path: table()])
def test_an_option_of_the_data_that_is_misspelt_or_misplaced_names_the_right_one(tmp_path, path, give):
    for name, nearest in (("lable", "'label'"), ("max_residue", "'max_residues'")):
        with pytest.raises(
            ConfigurationError, match=f"data_options has the unknown option '{name}': did you mean {nearest}"
        ):
            finetune(demo_model_path(), give(path), data_options={name: "x"}, output_dir=tmp_path)
    with pytest.raises(
        ConfigurationError,
        match=re.escape("""'label': it says how data are read, so write data_options={"label": "x"}"""),
    ):
        finetune(demo_model_path(), give(path), label="x", output_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=re.escape('data_options={"max_residues": 300}')):
        finetune(demo_model_path(), give(path), max_residues=300, output_dir=tmp_path)


def test_a_table_without_labels_names_the_option_for_python_and_for_a_command(tmp_path, capsys):
    rows = table().rename(columns={"label": "binds"})
    with pytest.raises(
        DataError, match=re.escape('it has id, sequence, binds. Name the column with data_options={"label": ...}')
    ):
        finetune(demo_model_path(), rows, output_dir=tmp_path)
    rows.to_csv(tmp_path / "t.csv", index=False)
    assert main(["finetune", str(tmp_path / "t.csv"), "--model", "demo", "-o", str(tmp_path / "o")]) != 0
    assert "it has id, sequence, binds. Name the column with --label" in capsys.readouterr().err


def test_a_second_table_is_in_the_words_of_a_command(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command_words("demo.csv", {"labels": "table.csv", "label": "binds"}, "8M")
    assert words == ("demo.csv", "--labels", str(path), "--label", "binds", "--model", "8M")


def test_the_split_of_a_data_set_with_typed_labels_is_that_of_its_column():
    rows = table().assign(split=["train"] * 20 + ["validation"] * 10 + ["test"] * 10)
    typed = Dataset.from_pandas(rows).class_encode_column("label")
    splits = splits_from(typed)
    assert set(splits["test"]["accession"]) == set(rows["id"][30:])
    assert splits["train"].features["label"].names == typed.features["label"].names
    several = typed.remove_columns("label").add_column("label", [{"a": 1.0, "b": 0.0}] * 40)
    with pytest.raises(ConfigurationError, match="has the column 'split', and several labels per sequence"):
        splits_from(several)


def test_an_index_is_no_second_column():
    rows = table().rename(columns={"id": "accession"})
    kept = rows.set_index("accession", drop=False)
    other = rows.set_axis([f"n{row}" for row in range(40)]).rename_axis("id")
    for given in (kept, other):
        assert set(splits_from(given)["test"]["accession"]) <= set(rows["accession"])


def test_labels_may_be_a_tensor():
    rows = table()
    splits = splits_from((rows["sequence"].tolist(), torch.tensor([0, 1] * 20)))
    assert splits["train"].features["label"].names == ["0", "1"]


def test_a_cache_folder_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match=r"cannot write into .*Set ESM_EFFICIENT_CACHE to a folder"):
        splits_from(table())
