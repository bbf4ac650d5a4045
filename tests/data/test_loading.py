"""load_sequences: files of every format and content, and the errors of wrong ones."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from sequence_files import LETTERS, fasta, frame, rows_of, write
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_deeploc, load_sequences, tokenize_dataset
from esm_efficient.data.readers import read_blocks
from esm_efficient.errors import ConfigurationError, DataError, EsmEfficientError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.xz", "a.parquet", "a.jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    table = frame()[["id", "sequence", "label"]]
    rows = rows_of(load_sequences(write(table, tmp_path / name)))
    assert len(rows) == len(table)
    for _, row in table.iterrows():
        found = rows[row["id"]]
        assert found == {
            "sequence": row["sequence"],
            "accession": row["id"],
            "residues": len(row["sequence"]),
            "label": ["membrane", "soluble"].index(row["label"]),
        }


def test_splits_are_those_of_files_a_column_partitions_clusters_or_random(tmp_path):
    table = frame()
    parts = {"train": table[:20], "validation": table[20:30], "test": table[30:]}
    files = {name: write(part, tmp_path / f"{name}.csv") for name, part in parts.items()}
    expected = {name: set(part.id) for name, part in parts.items()}

    def names(data):
        return {name: set(part["accession"]) for name, part in data.items()}

    found = load_sequences(files, label="label")
    assert names(found) == expected
    assert "split" not in found["train"].features
    words = ["Training"] * 20 + ["valid"] * 10 + ["test"] * 10
    column = write(table.assign(split=words), tmp_path / "column.csv")
    assert names(load_sequences(column, label="label")) == expected
    by_fold = load_sequences(
        write(table, tmp_path / "a.csv"), label="label", test_partitions=[0], validation_partitions=[]
    )
    assert names(by_fold)["test"] == set(table.id[table.fold == 0])

    clusters = tmp_path / "cluster.tsv"
    clusters.write_text("".join(f"P{i // 4 * 4}\tP{i}\n" for i in range(40)))
    options = {"label": "label", "clusters": clusters}
    clustered = names(load_sequences(write(table.drop(columns="fold"), tmp_path / "b.csv"), **options))
    for i in range(0, 40, 4):
        assert len({name for name, ids in clustered.items() for j in range(4) if f"P{i + j}" in ids}) == 1
    clusters.write_text("".join(f"P{i}\tP{i}\n" for i in range(39)))
    with pytest.raises(DataError, match=r"no cluster for 1 of 40 sequences: P39"):
        load_sequences(tmp_path / "b.csv", **options)
    with pytest.warns(UserWarning, match="homologous"):
        at_random = load_sequences(tmp_path / "b.csv", label="label", test_size=0.25)
    assert len(at_random["test"]) == 10
    assert names(at_random) == names(load_sequences(tmp_path / "b.csv", label="label", test_size=0.25))
    assert names(at_random) != names(load_sequences(tmp_path / "b.csv", label="label", test_size=0.25, seed=1))


def test_equal_sequences_are_never_split_at_random(tmp_path):
    table = pd.concat([frame(), frame().assign(id=[f"Q{i}" for i in range(40)])])[["id", "sequence", "label"]]
    data = load_sequences(write(table, tmp_path / "a.csv"))
    assert not set(data["train"]["sequence"]) & set(data["test"]["sequence"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_kind": "words"}, "label_kind"),
        ({"label": [], "label_kind": None}, "expected columns of 0 and 1"),
        ({"label": ["golgi"], "label_kind": "class"}, "without a label_kind"),
        ({"test_size": 2}, "test_size=2, validation_size=0.1: fractions must leave something to train on"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    path = write(frame(), tmp_path / "a.csv")
    with pytest.raises(ConfigurationError, match=message):
        load_sequences(path, **options)
    with pytest.raises(ConfigurationError, match="files for tests"):
        load_sequences({"train": path, "tests": path})


def test_files_that_are_swapped_swap_the_splits(tmp_path):
    table = frame()
    one, other = write(table[:20], tmp_path / "one.csv"), write(table[20:], tmp_path / "other.csv")
    first = load_sequences({"train": one, "test": other}, label="label")
    second = load_sequences({"train": other, "test": one}, label="label")
    assert set(first["train"]["accession"]) == set(second["test"]["accession"]) == set(table.id[:20])


@pytest.mark.slow
def test_the_real_table_has_the_same_splits_as_from_load_deeploc(deeploc_csv):
    own = load_deeploc(deeploc_csv, min_residues=None, max_residues=None)
    data = load_sequences(deeploc_csv, label="Membrane")
    assert {name: set(part["accession"]) for name, part in data.items()} == {
        n: set(p["accession"]) for n, p in own.items()
    }
    assert sum(data["train"]["label"]) == sum(own["train"]["label"])


# Cells that are unusual or wrong.
JUNK = [
    "",
    " ",
    "nan",
    "NaN",
    "-",
    "*",
    "\x00",
    "\x1b[0m",
    "\u202e",
    "🧬",
    "é",
    "1e400",
    "-1",
    "1.5",
    "None",
    "[1, 2]",
    '"',
]
JUNK += ["a,b", "a\tb", "a\nb", "M" * 5000, "mktv", "M K", "\ufeff", "=1+1", "0x1f", "1_000", "\u0661", "x" * 70]
STRUCTURAL = (
    "is empty|cannot be read|no column with a usual name|could be any of|more than one column is named|"
    "no sequence is left|"
    "leave nothing for|are in two splits|has the columns|whole number in every row|more than 1000 values|no file at|"
    "nothing is left|is not a FASTA file|is a FASTA file, which has no labels"
)


def generate(rng, folder):
    """A random file, its options, and its number of rows; None if bytes were damaged."""
    count = int(rng.integers(0, 14))
    sequences = ["".join(rng.choice(LETTERS, int(n))) for n in rng.integers(1, 60, count)]
    labels = {
        "class": [str(rng.choice(["a", "b"])) for _ in sequences],
        "number": [f"{value:.4f}" for value in rng.normal(size=count)],
        "zeros": [str(rng.integers(0, 2)) for _ in sequences],
        "residues": ["".join(rng.choice(list("HE"), len(s))) for s in sequences],
    }[str(rng.choice(["class", "number", "zeros", "residues"]))]
    columns = {"sequence": sequences, "label": labels, "accession": [f"P{i}" for i in range(count)]}
    if rng.random() < 0.2:
        columns["sample_weight"] = [str(value) for value in rng.random(count)]
    if rng.random() < 0.2:
        columns[str(rng.choice(["target", "SEQ", "note", "", "label"]))] = ["x"] * count
    for _ in range(int(rng.choice([0, 0, 1, 3]))):
        if count:
            name = str(rng.choice(list(columns)))
            columns[name] = list(columns[name])
            columns[name][int(rng.integers(count))] = str(rng.choice(JUNK))
    names = list(rng.permutation(list(columns)))
    kind = str(rng.choice(["csv", "tsv", "parquet", "fasta"], p=[0.4, 0.2, 0.15, 0.25]))
    path = folder / f"file.{kind}"
    options = {"test_size": 0.3, "validation_size": 0.0}
    if kind == "parquet":
        table = pa.table(
            {name: pa.array([None if c in ("", "nan") else c for c in columns[name]], pa.string()) for name in names}
        )
        if "number" in str(labels[:1]) or rng.random() < 0.2:
            table = table.append_column("extra", pa.array(np.full(count, np.nan)))
        parquet.write_table(table, path)
        content = path.read_bytes()
    elif kind == "fasta":
        lines = [
            f">{name} {label}\n{sequence}\n"
            for name, label, sequence in zip(columns["accession"], columns["label"], columns["sequence"], strict=True)
        ]
        count = (
            "".join(lines).count("\n>") + bool(lines)
            if all("\n" not in c for cells in columns.values() for c in cells)
            else None
        )
        content = "".join(lines).encode("utf-8", "replace")
        if rng.random() < 0.5:
            options["header"] = r"\S* ?(?P<label>.*)"
    else:
        text = io.StringIO()
        end = str(rng.choice(["\n", "\r\n"]))
        pd.DataFrame({name: columns[name] for name in names}, columns=names).to_csv(
            text, index=False, sep="," if kind == "csv" else "\t", lineterminator=end
        )
        content = text.getvalue().encode("utf-8-sig" if rng.random() < 0.3 else "utf-8", "replace")
    if rng.random() < 0.2:
        content = (gzip.compress if rng.random() < 0.5 else lzma.compress)(content)
    if rng.random() < 0.15 and content:
        damaged = bytearray(content)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = int(rng.integers(0, 256))
        content, count = bytes(damaged[: int(rng.integers(1, len(damaged) + 1))]), None
    path.write_bytes(content)
    if rng.random() < 0.2:
        options["label_kind"] = str(rng.choice(["class", "number", "residues"]))
    return path, options, count


FUZZED = int(os.environ.get("ESM_EFFICIENT_FUZZ", "250"))


@pytest.mark.parametrize("cases", [range(80), pytest.param(range(80, FUZZED), marks=pytest.mark.slow)], ids=str)
def test_any_file_is_loaded_whole_or_the_error_names_the_row(tmp_path, caplog, cases):
    """Set ESM_EFFICIENT_FUZZ=10000 for more cases."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    loaded, refused = 0, {}
    for case in cases:
        rng = np.random.default_rng(case)
        path, options, count = generate(rng, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = load_sequences(path, **options)
                tokenized, _ = tokenize_dataset(data, tokenizer, max_tokens=70)
            except EsmEfficientError as error:
                refused[case] = str(error)
                continue
        rows = sum(len(part) for part in tokenized.values())
        assert count is None or rows == count, (case, json.dumps(options))
        loaded += 1
    assert loaded > len(cases) / 5
    assert not [item for item in refused.items() if not re.search(rf"(line|row|record) \d+|{STRUCTURAL}", item[1])]


def test_the_label_of_rows_that_are_left_out_for_their_length_is_no_class(tmp_path):
    table = frame(30)
    table.loc[[3, 7], ["sequence", "label"]] = [["MKV" * 30, "long"], ["MKA" * 30, ""]]
    path = write(table, tmp_path / "table.csv")
    data = load_sequences(path, label="label", max_residues=60)
    assert data["train"].features["label"].names == sorted(set(table.label) - {"long", ""})
    assert sum(map(len, data.values())) == 28
    with pytest.raises(DataError, match="the label is missing"):
        load_sequences(path, label="label")


def test_blocks_without_a_row_of_an_allowed_length_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(read_blocks.__kwdefaults__, "rows", 5)
    table = frame(30)
    table.loc[:9, "sequence"] = "MKV" * 30
    data = load_sequences(write(table, tmp_path / "table.csv"), label="label", max_residues=60)
    assert {name for part in data.values() for name in part["accession"]} == set(table.id[10:])


@pytest.mark.parametrize("short", [[2, 5, 8], list(range(20))])
def test_the_right_row_is_left_out_beside_rows_of_another_length(tmp_path, short):
    table = frame(40)
    table.loc[short, "sequence"] = "MKV"
    table.loc[39, "label"] = ""
    path = write(table, tmp_path / "table.csv")
    data = load_sequences(path, label="label", min_residues=5, on_error="skip")
    kept = {name for part in data.values() for name in part["accession"]}
    assert kept == set(table.id) - set(table.id[[*short, 39]])


@pytest.mark.parametrize("empty", [0, 7])
def test_a_missing_list_of_labels_is_missing_wherever_it_is(tmp_path, empty):
    table = frame(20)
    labels = [list(text) for text in table.structure]
    labels[empty] = None
    table.assign(structure=labels)[["id", "sequence", "structure"]].to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"the label is missing in 1 row.*row {empty}: "):
        load_sequences(tmp_path / "t.parquet", label="structure")
    data = load_sequences(tmp_path / "t.parquet", label="structure", on_error="skip")
    assert sum(map(len, data.values())) == 19


def test_a_table_of_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    columns = [pa.array(["MKT", "MKA"]), pa.array(["a", "b"]), pa.array(["c", "d"])]
    parquet.write_table(pa.Table.from_arrays(columns, ["sequence", "label", "label"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="more than one column is named label"):
        load_sequences(tmp_path / "t.parquet")


def test_long_whole_numbers_stay_different_classes(tmp_path):
    labels = ["9007199254740992", "9007199254740993"] * 20
    path = write(frame(40).assign(label=labels), tmp_path / "t.csv")
    data = load_sequences(path, label="label", label_kind="class")
    assert data["train"].features["label"].names == ["9007199254740992", "9007199254740993"]


def test_a_second_table_without_a_usual_name_of_labels_is_an_error(tmp_path):
    table = frame(30)
    sequences = fasta(table, tmp_path / "proteins.fasta")
    labels = write(table[["id", "golgi"]], tmp_path / "labels.csv")
    with pytest.raises(
        DataError, match=r"labels.csv has no column .* of labels .*it has golgi. Name the column with label="
    ):
        load_sequences(sequences, labels=labels)
    named = load_sequences(sequences, labels=labels, label="golgi")
    assert {name: row["label"] for name, row in rows_of(named).items()} == {
        row.id: int(float(row.golgi)) for row in table.itertuples()
    }
    assert "label" not in load_sequences(sequences, labels=labels, label=False)["train"].features


@pytest.mark.parametrize("options", [{"label_kind": "positions"}, {"label_kind": "several"}, {"unlabelled": "-"}])
def test_an_option_of_labels_without_labels_is_an_error(tmp_path, options):
    path = write(frame()[["id", "sequence", "golgi"]], tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"no column .* of labels .*it has id, sequence, golgi\. Name"):
        load_sequences(path, **options)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "id",
            r"none of the 30 cells of 'id' is a sequence, such as line 2: 'P0'.* right column\? .*sequence, ",
        ),
        ("variant", r"24 of 30 cells of 'variant' are mutations, .*: write the whole sequence of each variant"),
        ("empty", r"none of the 30 cells of 'empty' is a sequence"),
    ],
)
def test_a_column_without_a_sequence_is_the_wrong_one(tmp_path, column, message, on_error):
    table = frame(30).assign(variant=["WT", "W68H", "A5G:K7R", "p.Trp68His", "T4*"] * 6, empty="")
    with pytest.raises(DataError, match=message):
        load_sequences(write(table, tmp_path / "t.csv"), sequence=column, label="label", on_error=on_error)


def test_the_only_column_of_sequences_cannot_be_that_of_the_labels(tmp_path):
    with pytest.raises(DataError, match=r"'sequence' is named for something else, .*it has id, label"):
        load_sequences(write(frame()[["id", "sequence", "label"]], tmp_path / "t.csv"), label="sequence")


def test_a_misspelt_column_names_the_nearest_one(tmp_path):
    with pytest.raises(DataError, match="no column 'Labels'; it has id, sequence, label: did you mean 'label'"):
        load_sequences(write(frame()[["id", "sequence", "label"]], tmp_path / "t.csv"), label="Labels")


def test_a_second_table_is_joined_although_its_accessions_have_another_name(tmp_path):
    table = frame(30)
    sequences = write(table[["id", "sequence"]].rename(columns={"id": "uniprotkb"}), tmp_path / "p.csv")
    labels = write(table[["id", "golgi"]], tmp_path / "l.csv")
    with pytest.raises(DataError, match=r"p\.csv has the columns uniprotkb, sequence, and none .*accession="):
        load_sequences(sequences, labels=labels, label="golgi")
    joined = load_sequences(sequences, labels=labels, label="golgi", accession="uniprotkb")
    expected = {row.id: int(float(row.golgi)) for row in table.itertuples()}
    assert {name: row["label"] for name, row in rows_of(joined).items()} == expected
    other = write(table[["id", "golgi"]].rename(columns={"id": "uniprotkb"}), tmp_path / "l2.csv")
    proteins = write(table[["id", "sequence"]], tmp_path / "p2.csv")
    joined = load_sequences(proteins, labels=other, label="golgi", accession="uniprotkb")
    assert {name: row["label"] for name, row in rows_of(joined).items()} == expected
    with pytest.raises(DataError, match="no column 'uniprot'"):
        load_sequences(sequences, labels=labels, label="golgi", accession="uniprot")
