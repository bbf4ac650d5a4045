"""The splits that a table tells itself: words, flags, and columns that contradict each other."""

from __future__ import annotations

import pytest
from sequence_files import frame, put, write

from esm_efficient import load_sequences
from esm_efficient.data.readers import read_blocks
from esm_efficient.errors import ConfigurationError, DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]

WORDS = ["train"] * 20 + ["test"] * 20
FLIP = ["True" if i % 4 == 0 else "False" for i in range(20)] + [""] * 20


def table():
    return frame()[["id", "sequence", "label"]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"set": WORDS, "validation": FLIP}, (15, 5, 20)),
        ({"set": WORDS}, (20, 0, 20)),
        ({"stage": ["train"] * 30 + ["valid"] * 4 + ["test"] * 6}, (30, 4, 6)),
        ({"Split": ["train"] * 30 + ["dev"] * 4 + ["test"] * 6}, (30, 4, 6)),
        ({"fold": WORDS}, (20, 0, 20)),
        ({"usage": WORDS}, (20, 0, 20)),
        ({"is_test": ["0"] * 30 + ["1"] * 10}, (30, 0, 10)),
        ({"is_train": ["1"] * 30 + ["0"] * 10}, (30, 0, 10)),
        ({"train": ["1"] * 30 + ["0"] * 10, "Test": ["False"] * 30 + ["True"] * 10}, (30, 0, 10)),
        ({"is_test": ["0"] * 30 + ["1"] * 10, "is_valid": ["1"] * 5 + ["0"] * 35}, (25, 5, 10)),
        ({"is_train": ["1"] * 30 + ["0"] * 10, "validation": ["1"] * 5 + [""] * 35}, (25, 5, 10)),
        ({"validation": FLIP}, (35, 5, 0)),
    ],
)
def test_columns_that_tell_the_split_are_used(tmp_path, columns, expected):
    data = load_sequences(write(table().assign(**columns), tmp_path / "a.csv"), label="label")
    assert tuple(len(data[name]) if name in data else 0 for name in ("train", "validation", "test")) == expected


def test_a_validation_flag_is_named_or_ignored(tmp_path):
    rows = table().assign(set=WORDS, held=FLIP)
    path = write(rows, tmp_path / "a.csv")
    assert set(load_sequences(path, validation="held")["validation"]["accession"]) == {f"P{i}" for i in range(0, 20, 4)}
    assert set(load_sequences(path)) == {"train", "test"}
    path = write(rows.rename(columns={"held": "validation"}), tmp_path / "b.csv")
    assert set(load_sequences(path, validation=False)) == {"train", "test"}
    with pytest.warns(UserWarning, match="homologous"):
        data = load_sequences(path, split=False)
    assert len(data["test"]) == 8
    files = {"train": write(rows[:20], tmp_path / "train.csv"), "test": write(rows[20:], tmp_path / "test.csv")}
    assert len(load_sequences(files, validation="held")["validation"]) == 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"set": ["A"] * 40}, "set is not train, validation or test in 40 row.*pass split=False"),
        ({"set": WORDS, "validation": ["yes"] * 40}, "validation is neither true nor false in 40 .*validation=False"),
        ({"set": WORDS, "validation": ["1"] * 40}, "the split contradicts validation in 20 row.*line 22"),
        ({"set": WORDS, "is_test": ["1"] * 40}, "the split contradicts is_test in 20 row.*line 2:"),
        ({"is_test": ["1"] * 40, "is_train": ["1"] * 40}, "the split contradicts is_train and is_test in 40"),
        ({"is_test": ["0"] * 40, "is_train": ["0"] * 40}, "contradicts is_train and is_test in 40"),
        ({"set": WORDS, "split": WORDS}, "split could be any of 'set', 'split'"),
        ({"usage": WORDS, "part": WORDS}, "the split could be any of usage, part"),
    ],
)
def test_columns_that_contradict_each_other_or_say_something_else_are_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load_sequences(write(table().assign(**columns), tmp_path / "a.csv"))


def test_an_option_that_the_splits_of_the_file_would_overrule_is_refused(tmp_path):
    clusters = tmp_path / "cluster.tsv"
    clusters.write_text("".join(f"P{i}\tP{i}\n" for i in range(40)))
    path = write(frame().assign(set=WORDS)[["id", "sequence", "label", "set", "fold"]], tmp_path / "a.csv")
    for options in ({"clusters": clusters}, {"partition": "fold"}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(options))}= would not be used.*split=False"):
            load_sequences(path, **options)
        load_sequences(path, split=False, **options)


def test_wrong_words_can_be_left_out(tmp_path):
    path = write(put(table().assign(set=WORDS), "set", "?"), tmp_path / "a.csv")
    assert sum(map(len, load_sequences(path, on_error="skip").values())) == 39


def test_a_column_of_splits_is_found_in_rows_that_are_sorted_by_it(tmp_path, monkeypatch):
    monkeypatch.setitem(read_blocks.__kwdefaults__, "rows", 10)
    # Other sizes than those of a random split.
    rows = table().assign(phase=["train"] * 23 + ["val"] * 5 + ["test"] * 12, origin=["train"] * 39 + ["plane"])
    for order in (rows, rows[::-1], rows.sample(frac=1.0, random_state=0)):
        splits = load_sequences(write(order, tmp_path / "a.csv"))
        assert {name: len(split) for name, split in splits.items()} == {"train": 23, "validation": 5, "test": 12}
        assert set(splits["test"]["accession"]) == set(rows.id[28:])


@pytest.mark.parametrize(
    ("partitions", "test", "validation"),
    [([0, 1, 2, 3, 4], 4, 3), ([0, 1, 2], 2, 1), ([1, 2], 2, None), ([5, 7, 9], 9, 7)],
)
def test_the_highest_partitions_test_and_validate(tmp_path, partitions, test, validation):
    folds = [partitions[row % len(partitions)] for row in range(40)]
    splits = load_sequences(write(table().assign(fold=folds), tmp_path / "a.csv"))
    assert set(splits["test"]["partition"]) == {test}
    assert ("validation" in splits) == (validation is not None)
    if validation is not None:
        assert set(splits["validation"]["partition"]) == {validation}
    assert set(splits["train"]["partition"]) == set(partitions) - {test, validation}


def test_numbers_that_may_be_no_partitions_are_asked_for(tmp_path):
    path = write(table().assign(fold=range(40)), tmp_path / "a.csv")
    with pytest.raises(ConfigurationError, match=r"40 different numbers: pass partition=False.*test_partitions="):
        load_sequences(path)
    assert "partition" not in load_sequences(path, partition=False)["train"].column_names
    assert len(load_sequences(path, test_partitions=[3], validation_partitions=[])["test"]) == 1
    with pytest.raises(DataError, match="or pass partition=False if they are none"):
        load_sequences(write(table().assign(fold=["a.1.1"] * 40), tmp_path / "b.csv"))


def test_one_partition_leaves_nothing_to_train_on(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no partition of \[0\] is left to train on"):
        load_sequences(write(table().assign(fold=0), tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["test_partitions", "validation_partitions"])
def test_partitions_that_would_not_be_used_are_refused(tmp_path, name):
    plain, told = write(table(), tmp_path / "a.csv"), write(table().assign(set=WORDS), tmp_path / "b.csv")
    with pytest.raises(ConfigurationError, match=f"{name}= needs a column of partitions"):
        load_sequences(plain, **{name: [3]})
    with pytest.raises(ConfigurationError, match=f"{name}= would not be used"):
        load_sequences(told, **{name: []})
    with_folds = write(table().assign(fold=[0, 1, 2, 3] * 10), tmp_path / "c.csv")
    with pytest.raises(ConfigurationError, match=f"{name}=3: expected a list of whole numbers"):
        load_sequences(with_folds, **{name: 3})


@pytest.mark.parametrize("name", ["test_size", "validation_size"])
def test_sizes_that_would_not_be_used_are_refused(tmp_path, name):
    split = write(table().assign(set=WORDS), tmp_path / "split.csv")
    with pytest.raises(ConfigurationError, match=f"the files tell their splits, so {name}= would not be used"):
        load_sequences(split, **{name: 0.3})
    folds = write(table().assign(fold=[i % 4 for i in range(40)]), tmp_path / "folds.csv")
    with pytest.raises(ConfigurationError, match=f"{name}= would not be used.*partition=False"):
        load_sequences(folds, **{name: 0.3})
    sizes = {name: len(split) for name, split in load_sequences(folds, partition=False, **{name: 0.25}).items()}
    assert sizes[name.removesuffix("_size")] == 10


def test_the_file_of_a_split_must_not_hold_rows_of_another(tmp_path):
    rows = table().assign(split=["train"] * 30 + ["test"] * 10)
    files = {"train": write(rows, tmp_path / "train.csv"), "test": write(rows[30:], tmp_path / "test.csv")}
    with pytest.raises(DataError, match=r"that of another split than split says in 10 row.*pass split=False"):
        load_sequences(files)
    files["train"] = write(rows[:20], tmp_path / "train.csv")
    files["validation"] = write(rows[20:30], tmp_path / "validation.csv")  # "train" may mean both
    assert {name: len(split) for name, split in load_sequences(files).items()} == {
        "train": 20,
        "validation": 10,
        "test": 10,
    }


def test_a_column_of_folds_is_not_read_if_the_split_is_known(tmp_path):
    """It may be the fold of a protein; with a name it is a partition."""
    rows = table().assign(set=WORDS, fold=["TIM barrel", "Rossmann"] * 20)
    data = load_sequences(write(rows, tmp_path / "a.csv"))
    assert {name: len(split) for name, split in data.items()} == {"train": 20, "test": 20}
    assert "partition" not in data["train"].column_names
    assert len(load_sequences({"test": write(rows.drop(columns="set"), tmp_path / "b.csv")})["test"]) == 40
    with pytest.raises(DataError, match="fold"):
        load_sequences(write(rows.drop(columns="set"), tmp_path / "b.csv"))
