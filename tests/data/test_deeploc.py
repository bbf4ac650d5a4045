"""load_deeploc: the peculiarities of the table, and the errors of a wrong one."""

from __future__ import annotations

import gzip
import logging
import lzma

import pandas as pd
import pytest

from esm_efficient import load_deeploc, stratified_sample, write_demo_table
from esm_efficient.data.deeploc import COLUMNS, LOCATIONS
from esm_efficient.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def frame(demo_table) -> pd.DataFrame:
    return pd.read_csv(demo_table, dtype=str, keep_default_na=False)


@pytest.fixture
def write(tmp_path):
    def write(frame: pd.DataFrame, name: str = "table.csv"):
        frame.to_csv(tmp_path / name, index=False)
        return tmp_path / name

    return write


def rows_of(data) -> set[str]:
    return {accession for split in data.values() for accession in split["accession"]}


def test_features_and_labels(demo_table, frame):
    data = load_deeploc(demo_table, min_residues=None, max_residues=None)
    assert list(data) == ["train", "validation", "test"]
    features = data["train"].features
    assert list(features) == ["sequence", "label", "kingdom", "accession", "partition", "residues"]
    assert features["label"].names == ["non-membrane", "membrane"]
    by_accession = frame.set_index("ACC")
    seen = 0
    for split in data.values():
        for row in split:
            source = by_accession.loc[row["accession"]]
            assert row["label"] == float(source["Membrane"])
            assert row["sequence"] == source["Sequence"]
            assert row["residues"] == len(source["Sequence"])
            assert row["kingdom"] == source["Kingdom"]
            assert row["partition"] == int(source["Partition"])
            seen += 1
    assert seen == len(frame)


def test_the_label_is_membrane_and_not_cell_membrane(frame, write):
    swapped = frame.copy()
    swapped["Cell membrane"] = (swapped["Membrane"].astype(float) == 0).astype(float).astype(str)
    data, original = load_deeploc(write(swapped)), load_deeploc(write(frame, "original.csv"))
    assert data["test"]["label"][:] == original["test"]["label"][:]


@pytest.mark.parametrize("compress", ["gz", "xz"])
def test_compressed_tables_read_the_same(demo_table, tmp_path, compress):
    opener = {"gz": gzip.open, "xz": lzma.open}[compress]
    packed = tmp_path / f"table.csv.{compress}"
    with opener(packed, "wb") as handle:
        handle.write(demo_table.read_bytes())
    assert load_deeploc(packed)["train"][:] == load_deeploc(demo_table)["train"][:]


def test_residue_bounds_are_inclusive_and_can_be_lifted(demo_table, frame):
    lengths = frame["Sequence"].str.len()
    assert rows_of(load_deeploc(demo_table)) == set(frame["ACC"][lengths.between(100, 512)])
    shortest = int(lengths[lengths >= 100].min())
    data = load_deeploc(demo_table, min_residues=shortest, max_residues=None)
    assert rows_of(data) == set(frame["ACC"][lengths >= shortest])
    with pytest.raises(DataError, match="no protein"):
        load_deeploc(demo_table, min_residues=10**6, max_residues=None)


def test_partitions_make_the_splits(demo_table):
    data = load_deeploc(demo_table, test_partitions=(0,), validation_partitions=(2, 3))
    assert {name: set(split["partition"]) for name, split in data.items()} == {
        "train": {1, 4},
        "validation": {2, 3},
        "test": {0},
    }
    assert list(load_deeploc(demo_table, validation_partitions=())) == ["train", "test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_partitions": (3,)}, "for the test set and for the validation set"),
        ({"test_partitions": (7,)}, r"\[7\] are not in the table"),
        ({"test_partitions": ()}, "test_partitions is empty"),
        ({"test_partitions": (0, 1, 2), "validation_partitions": (3, 4)}, "left to train on"),
        ({"test_partitions": 4}, "expected a list of whole numbers"),
        ({"split": "both"}, '"partition" or "random"'),
        ({"split": "random", "test_size": 0.95}, "something to train on"),
        ({"test_size": 0.3}, 'test_size= would not be used with split="partition"'),
        ({"validation_size": 0.3}, 'validation_size= would not be used with split="partition"'),
        ({"split": "random", "test_partitions": [0]}, 'test_partitions= would not be used with split="random"'),
        ({"split": "random", "validation_partitions": []}, "validation_partitions= would not be used with split="),
    ],
)
def test_contradicting_split_options_are_refused(demo_table, options, message):
    with pytest.raises(ConfigurationError, match=message):
        load_deeploc(demo_table, **options)


def test_rows_are_shuffled_by_seed(demo_table):
    first, again, other = (load_deeploc(demo_table, seed=s)["train"]["sequence"][:] for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != sorted(first)
    assert sorted(first) == sorted(other)


def test_random_split_is_stratified_seeded_and_warns(demo_table):
    with pytest.warns(UserWarning, match="homologous"):
        data = load_deeploc(demo_table, split="random", test_size=0.25, validation_size=0.25, seed=3)
    with pytest.warns(UserWarning, match="homologous"):
        again = load_deeploc(demo_table, split="random", test_size=0.25, validation_size=0.25, seed=3)
    total = sum(len(split) for split in data.values())
    assert [round(len(data[name]) / total, 2) for name in data] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    shares = [sum(split["label"]) / len(split) for split in data.values()]
    assert max(shares) - min(shares) < 0.02
    assert data["test"]["accession"][:] == again["test"]["accession"][:]
    with pytest.warns(UserWarning, match="homologous"):
        assert list(load_deeploc(demo_table, split="random", validation_size=0)) == ["train", "test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="Membrane"), "no column 'Membrane'.*Cell membrane"),
        (lambda f: f.rename(columns={"Sequence": "sequence"}), "no column 'Sequence'"),
        (lambda f: put(f, 3, "Membrane", ""), r"label is missing.*line 5 \("),
        (lambda f: put(f, 3, "Membrane", "nan"), r"label is neither 0 nor 1.*line 5 \(.*'nan'"),
        (lambda f: put(f, 4, "Membrane", "0.5"), r"neither 0 nor 1 in 1 row.*line 6 \("),
        (lambda f: put(f, 4, "Membrane", "2.0"), "neither 0 nor 1"),
        (lambda f: put(f, 0, "Partition", "x"), r"Partition.*line 2 \("),
        (lambda f: put(f, 0, "Sequence", "  "), r"the sequence is empty.*line 2 \("),
        (lambda f: put(f, 0, "Sequence", "MK1V"), r"not letters.*line 2 \("),
        (lambda f: put(f, 1, "ACC", f["ACC"][0]), r"more than once in 2 row.*line 2 .*line 3 "),
        (lambda f: put(f, 1, "ACC", ""), "accession .* empty.*line 3 .no accession"),
    ],
)
def test_an_error_in_a_table_names_the_rows(frame, write, change, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_deeploc(write(change(frame.copy())))


def put(frame, row, column, value):
    frame.loc[row, column] = value
    return frame


def test_all_wrong_rows_are_counted(frame, write):
    broken = frame.copy()
    broken["Membrane"] = ""
    with pytest.raises(DataError, match=f"in {len(frame)} row.*and {len(frame) - 5} more"):
        load_deeploc(write(broken))


def test_a_sequence_in_two_splits_is_refused_and_within_one_is_counted(frame, write, caplog):
    usable = frame[frame["Sequence"].str.len().between(100, 512)]
    copied = usable[usable["Partition"] == "0"].iloc[0].copy()
    copied["ACC"] = "COPY"
    twice = pd.concat([frame, copied.to_frame().T])
    with caplog.at_level(logging.WARNING):
        load_deeploc(write(twice))
    assert "1 sequence(s) occur more than once" in caplog.text
    copied["Partition"] = "4"
    with pytest.raises(DataError, match=r"two splits.*COPY \(train and test\)"):
        load_deeploc(write(pd.concat([frame, copied.to_frame().T])))


def test_a_missing_or_damaged_file_is_refused(tmp_path, demo_table):
    with pytest.raises(DataError, match="no file at"):
        load_deeploc(tmp_path / "absent.csv")
    table = demo_table.read_bytes()
    broken = {
        "empty.csv": (b"", "is empty"),
        "binary.csv": (b"\xff\xfe\x00\x01", "not text|UTF-8"),
        "text.csv.gz": (b"not gzip", "has column names but no rows"),
        "cut.csv.gz": (gzip.compress(table)[:-2000], "cannot be read .*EOFError"),
        "damaged.csv.xz": (b"\xfd7zXZ\x00 and then no xz data", "cannot be read .*LZMAError"),
        "cut.csv.xz": (lzma.compress(table)[:-2000], "cannot be read .*(EOFError|LZMAError)"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_deeploc(tmp_path / name)


def test_the_checksum_of_a_local_file_is_checked_too(demo_table):
    with pytest.raises(DataError, match="has SHA-256"):
        load_deeploc(demo_table, sha256="0" * 64)


def test_sequences_are_cleaned_of_lower_case_and_white_space(frame, write):
    changed = frame.copy()
    changed["Sequence"] = changed["Sequence"].str.lower() + " "
    assert load_deeploc(write(changed))["test"][:] == load_deeploc(write(frame, "plain.csv"))["test"][:]


def test_a_sample_keeps_the_label_frequencies(demo_table):
    train = load_deeploc(demo_table)["train"]
    share = sum(train["label"]) / len(train)
    sample = stratified_sample(train, 60, seed=1)
    assert len(sample) == 60
    assert sum(sample["label"]) / 60 == pytest.approx(share, abs=1 / 60)
    assert sample["accession"][:] == stratified_sample(train, 60, seed=1)["accession"][:]
    assert sample["accession"][:] != stratified_sample(train, 60, seed=2)["accession"][:]
    for size in (len(train) - 1, len(train), 10**6):
        assert len(set(stratified_sample(train, size)["accession"])) == min(size, len(train))
    with pytest.raises(ConfigurationError, match="at least one row"):
        stratified_sample(train, 0)


@pytest.mark.slow
def test_the_real_table(deeploc_csv):
    data = load_deeploc(deeploc_csv)
    assert sum(len(split) for split in data.values()) == 15_876
    assert sum(sum(split["label"]) for split in data.values()) == 4_701
    assert len(data["test"]) == sum(p == 4 for split in data.values() for p in split["partition"])
    whole = load_deeploc(deeploc_csv, min_residues=None, max_residues=None, validation_partitions=())
    assert sum(len(split) for split in whole.values()) == 28_303
    assert len(whole["test"]) == 5_462
    raw = pd.read_csv(deeploc_csv)
    assert int((raw["Membrane"] != raw["Cell membrane"]).sum()) == 4_550
    labels = {row["accession"]: row["label"] for split in whole.values() for row in split}
    assert labels == dict(zip(raw["ACC"], raw["Membrane"].astype(int), strict=True))


def test_the_demo_table_has_the_schema_of_the_real_one(deeploc_csv, tmp_path):
    demo = write_demo_table(tmp_path / "demo.csv", proteins=100)
    assert demo.read_bytes().count(b"\r\n") == 101
    real, ours = pd.read_csv(deeploc_csv, nrows=100), pd.read_csv(demo)
    assert list(ours.columns) == list(real.columns) == ["Unnamed: 0", *COLUMNS]
    assert (ours.dtypes == real.dtypes).all()


def test_locations_are_ten_labels_per_protein(demo_table, frame):
    data = load_deeploc(demo_table, task="location", min_residues=None, max_residues=None)
    assert list(data["train"].features["label"]) == list(LOCATIONS)
    found = {row["accession"]: row["label"] for split in data.values() for row in split}
    assert len(found) == len(frame)
    for _, row in frame.iterrows():
        assert found[row["ACC"]] == {name: float(row[name]) for name in LOCATIONS}


def test_labels_can_be_any_columns_and_an_empty_cell_is_unknown(frame, write):
    frame["Binds zinc"] = ["1", "", "0"] * (len(frame) // 3)
    table = write(frame)
    both = load_deeploc(
        table, task={"zinc": "Binds zinc", "golgi": "Golgi apparatus"}, min_residues=None, max_residues=None
    )
    zinc = [row["label"]["zinc"] for split in both.values() for row in split]
    assert sorted({str(value) for value in zinc}) == ["0.0", "1.0", "None"]
    assert zinc.count(None) == len(frame) // 3
    one = load_deeploc(table, task={"golgi": "Golgi apparatus"})
    assert one["train"].features["label"].names == ["not golgi", "golgi"]
    with pytest.raises(DataError, match="the Binds zinc label is missing"):
        load_deeploc(table, task={"zinc": "Binds zinc"})
    frame.loc[3, "Binds zinc"] = "2"
    with pytest.raises(DataError, match=r"neither 0 nor 1 in 1 row.*line 5"):
        load_deeploc(write(frame), task={"zinc": "Binds zinc", "golgi": "Golgi apparatus"})


@pytest.mark.parametrize("task", ["golgi", {}, {"a": 3}, ["Nucleus"]])
def test_an_unknown_task_is_refused(demo_table, task):
    with pytest.raises(ConfigurationError, match="expected membrane or location, or a mapping of label names"):
        load_deeploc(demo_table, task=task)


def test_a_missing_column_is_named(demo_table):
    with pytest.raises(DataError, match="no column 'Binds zinc'"):
        load_deeploc(demo_table, task={"zinc": "Binds zinc"})


def test_several_labels_are_split_and_sampled_at_random(demo_table):
    with pytest.warns(UserWarning, match="homologous"):
        data = load_deeploc(demo_table, task="location", split="random")
    assert len(stratified_sample(data["train"], 20)) == 20
    assert stratified_sample(data["train"], 20)["accession"][:] == stratified_sample(data["train"], 20)["accession"][:]


@pytest.mark.slow
def test_the_real_table_has_ten_locations(deeploc_csv):
    data = load_deeploc(deeploc_csv, task="location", min_residues=None, max_residues=None)
    labels = [row for split in data.values() for row in split["label"]]
    assert len(labels) == 28303
    assert sum(sum(row.values()) > 1 for row in labels) == 6684


def test_nucleotides_are_refused(frame, write, caplog):
    genes = frame["Sequence"].str.translate(str.maketrans({c: "ACGT"[ord(c) % 4] for c in "ACDEFGHIKLMNPQRSTVWYXUB"}))
    with pytest.raises(DataError, match=r"table\.csv: \d+ of \d+ sequences consist of the letters A, C, G"):
        load_deeploc(write(frame.assign(Sequence=genes)))
    load_deeploc(write(frame.assign(Sequence=[genes[0], *frame["Sequence"][1:]])))
    assert f"1 sequence(s) may be nucleotides, not proteins: {frame['ACC'][0]}" in caplog.text
