"""load_sequences(streaming=True): the same rows, shuffled on disk, read one after another."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import IterableDatasetDict

from esm_efficient import load_sequences, tokenize_dataset
from esm_efficient.data import streams
from esm_efficient.errors import ConfigurationError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:A random split")
ROWS = 400


@pytest.fixture(autouse=True)
def small_buckets(tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "_BUCKET", 50)


@pytest.fixture
def table(tmp_path):
    """Rows in order of their label, some sequences more than once, clusters of two."""
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), int(n))) for n in rng.integers(10, 30, ROWS)]
    sequences[1::10] = sequences[::10]
    frame = pd.DataFrame({"id": [f"P{i}" for i in range(ROWS)], "sequence": sequences})
    frame["label"] = np.where(frame.index < ROWS // 2, "no", "yes")
    frame["fold"] = frame.index // 2 % 5
    frame["set"] = np.select([frame["fold"] == 0, frame["fold"] == 1], ["test", "dev"], "train")
    frame["weight"] = 0.5
    frame.to_csv(tmp_path / "table.csv", index=False)
    lines = [f"P{i // 2 * 2}\tP{i}" for i in range(ROWS)]
    (tmp_path / "clusters.tsv").write_text("\n".join(lines))
    return tmp_path / "table.csv"


def rows_of(data) -> dict[str, list]:
    return {name: sorted(tuple(row.values()) for row in split) for name, split in data.items()}


@pytest.mark.parametrize(
    "options", [{"partition": "fold", "test_partitions": (0,), "validation_partitions": (1, 2)}, {"split": "set"}]
)
def test_named_splits_hold_the_rows_of_the_mapped_ones(table, options):
    options |= {"sample_weight": "weight"}
    streamed, mapped = (load_sequences(table, streaming=streaming, **options) for streaming in (True, False))
    assert isinstance(streamed, IterableDatasetDict)
    assert rows_of(streamed) == rows_of(mapped)
    for name, stream in streamed.items():
        assert stream.features == mapped[name].features
        assert stream.info.splits[name].num_examples == len(mapped[name])


@pytest.mark.parametrize("grouped", [True, False])
def test_splits_by_hash_keep_groups_whole_and_have_the_sizes_asked_for(table, grouped):
    clusters = table.with_name("clusters.tsv") if grouped else None
    data = load_sequences(without(table, "fold"), clusters=clusters, streaming=True)
    found = {row["accession"]: name for name, split in data.items() for row in split}
    assert len(found) == ROWS
    sizes = {name: list(found.values()).count(name) for name in data}
    # Seven standard deviations of a binomial count, doubled variance for pairs.
    assert abs(sizes["test"] - 0.2 * ROWS) < 7 * np.sqrt(2 * 0.16 * ROWS)
    assert abs(sizes["validation"] - 0.1 * ROWS) < 7 * np.sqrt(2 * 0.09 * ROWS)
    pairs = range(0, ROWS, 2) if grouped else range(0, ROWS, 10)
    assert all(found[f"P{i}"] == found[f"P{i + 1}"] for i in pairs)


def without(table, column):
    path = table.with_name("without.csv")
    pd.read_csv(table).drop(columns=column).to_csv(path, index=False)
    return path


def test_the_order_is_random_and_of_the_seed(table):
    first, again, other = (
        [row["accession"] for row in load_sequences(table, split="set", seed=seed, streaming=True)["train"]]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    place = np.array([int(name[1:]) for name in first])
    # Of the rank correlation of n shuffled rows, 1 / sqrt(n) is the standard deviation.
    assert abs(np.corrcoef(place, np.arange(len(place)))[0, 1]) < 5 / np.sqrt(len(place))
    # Of n shuffled rows half come after a row that stood before them in the file; the variance is n / 12.
    assert abs(np.count_nonzero(np.diff(place) > 0) - len(place) / 2) < 5 * np.sqrt(len(place) / 12)


def test_a_sequence_in_two_splits_is_named_and_leaves_nothing_behind(table, tmp_path, caplog):
    frame = pd.read_csv(table)
    frame.loc[0, "set"], frame.loc[1, "set"] = "train", "test"
    frame.to_csv(table, index=False)
    with pytest.raises(DataError, match="P0 = P1"):
        load_sequences(table, split="set", streaming=True)
    assert not [path for path in (tmp_path / "cache" / "tables").iterdir() if path.is_dir()]
    load_sequences(without(table, "set"), clusters=table.with_name("clusters.tsv"), streaming=True)
    assert "40 sequence(s) stand more than once within their split" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "fold", "test_partitions": (9,)}, r"\[9\] are not in the table"),
        ({"partition": "fold", "test_partitions": (0,), "validation_partitions": (0,)}, "and for the validation set"),
        ({"split": "one"}, "all 400 rows fall into train"),
    ],
)
def test_splits_that_cannot_be_are_refused(table, options, message):
    frame = pd.read_csv(table)
    frame["one"] = "train"
    frame.to_csv(table, index=False)
    with pytest.raises(ConfigurationError, match=message):
        load_sequences(table, streaming=True, **options)


def test_a_sequence_without_a_cluster_is_named(table):
    clusters = table.with_name("clusters.tsv")
    clusters.write_text("\n".join(clusters.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"no cluster for 1 of .*P399"):
        load_sequences(table, clusters=clusters, streaming=True)


def test_tokens_and_counts_are_those_of_mapped_splits(table, tokenizer):
    streamed, mapped = (load_sequences(table, split="set", streaming=streaming) for streaming in (True, False))
    (first, counted), (second, expected) = (
        tokenize_dataset(data, tokenizer, max_length=20) for data in (streamed, mapped)
    )
    assert isinstance(first, IterableDatasetDict)
    assert counted.splits == expected.splits
    assert counted.total.residues_cut > 0
    for name, stream in first.items():
        assert stream.features == second[name].features
        assert sorted(map(repr, stream)) == sorted(map(repr, second[name]))
