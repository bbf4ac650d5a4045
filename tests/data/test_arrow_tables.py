"""Files become one cached table: joined labels, counted rows, and a file that changes."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sequence_files import fasta, frame, rows_of, write

from esm_efficient import load_sequences
from esm_efficient.errors import ConfigurationError, DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]


def test_labels_of_fasta_come_from_headers_or_a_second_table_or_are_absent(tmp_path, caplog):
    table = frame()
    path = fasta(table, tmp_path / "a.fasta")
    by_header = load_sequences(path, header=r"class=(?P<label>\w+) fold=(?P<partition>\d)")
    assert {row["partition"] for row in by_header["test"]} == {4}
    labels = write(table[["id", "label"]], tmp_path / "labels.csv")
    by_table = load_sequences(path, labels=labels)
    none = load_sequences(path)
    assert "label" not in none["train"].features
    for row in table.itertuples():
        for data in (by_header, by_table):
            assert data["train"].features["label"].int2str(rows_of(data)[row.id]["label"]) == row.label
        assert rows_of(none)[row.id]["sequence"] == row.sequence
    with caplog.at_level(logging.WARNING):
        load_sequences(fasta(table[:30], tmp_path / "b.fasta"), labels=labels)
    assert "10 row(s) of the second table have no sequence" in caplog.text
    with pytest.raises(DataError, match=r"the second table has no label in 1 row\(s\).*record 3 \(P2\)"):
        load_sequences(path, labels=write(table[table.id != "P2"], tmp_path / "few.csv"), label="label")
    with pytest.raises(DataError, match=r"does not match.*record 3 \(P2\)"):
        load_sequences(path, header=r"class=(?P<label>\w+) fold=[^2]")
    few = write(table.loc[table.id != "P2", ["id", "label"]], tmp_path / "few.csv")
    with caplog.at_level(logging.WARNING):
        data = load_sequences(path, labels=few, on_error="skip")
    assert set(rows_of(data)) == set(table.id) - {"P2"}
    assert "left out 1 row(s), the second table has no label: " in caplog.text
    for header, message in (("(", "not a regular expression"), ("class", "no named group")):
        with pytest.raises(ConfigurationError, match=message):
            load_sequences(path, header=header)


def test_all_columns_of_a_second_table_are_joined(tmp_path):
    table = frame()
    sequences = fasta(table, tmp_path / "a.fasta")
    words = ["train"] * 25 + ["test"] * 15
    second = table[["id", "label"]].rename(columns={"id": "prot"}).assign(split=words, sample_weight=np.arange(40))
    data = load_sequences(sequences, labels=write(second, tmp_path / "labels.csv"), accession="prot")
    assert set(data["test"]["accession"]) == set(table.id[25:])
    assert {row["accession"]: row["sample_weight"] for row in data["test"]} == {
        f"P{i}": float(i) for i in range(25, 40)
    }
    with pytest.raises(DataError, match="both have a column header"):
        load_sequences(sequences, labels=write(second.assign(header="x"), tmp_path / "twice.csv"), accession="prot")


def test_a_second_table_may_repeat_the_sequences(tmp_path):
    table = frame()
    path = fasta(table, tmp_path / "a.fasta")
    second = table[["id", "label", "sequence"]]
    repeated = second.assign(sequence=second["sequence"].str.lower() + "*")
    data = load_sequences(path, labels=write(repeated, tmp_path / "labels.csv"))
    assert sorted(text for split in data.values() for text in split["sequence"]) == sorted(table["sequence"])
    second.loc[3, "sequence"] = "MKTAYIAKQR"
    with pytest.raises(DataError, match="both have a column sequence"):
        load_sequences(path, labels=write(second, tmp_path / "others.csv"))


def test_a_file_without_a_line_of_names_is_refused_with_its_first_protein(tmp_path):
    """Its first protein would be lost as the name of a column."""
    sequences = ["MKTAYIAKQRQISFVKSHFSRQ", *frame()["sequence"]]
    (tmp_path / "list.txt").write_text("\n".join(sequences))
    for options in ({}, {"sequence": sequences[0]}):
        with pytest.raises(
            DataError, match=r"first line has a sequence \(MKTAYIAKQRQISFVKSHFS\.\.\.\) where the names"
        ):
            load_sequences(tmp_path / "list.txt", **options)
    named = frame().assign(MKTAYIAKQRQISFVKSHFSRQ=1.0)  # a column about a peptide
    data = load_sequences(write(named, tmp_path / "named.csv"))
    assert sum(map(len, data.values())) == len(named)


def test_a_fasta_file_without_labels_names_the_table_of_labels(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{row.id}\n{row.sequence}\n" for row in frame().itertuples()))
    with pytest.raises(DataError, match=r"is a FASTA file, which has no labels. Give a table of .* with labels="):
        load_sequences(path, label_kind="class")


def test_uniprot_names_match_accessions(tmp_path):
    table = frame()
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">sp|{row.id}|X_HUMAN words\n{row.sequence}\n" for row in table.itertuples()))
    clusters = tmp_path / "out.clstr"
    clusters.write_text("".join(f">Cluster {i}\n0\t20aa, >sp|P{i}|X_HUMAN... *\n" for i in range(40)))
    data = load_sequences(path, clusters=clusters)
    assert sum(map(len, data.values())) == 40


def test_sequences_outside_the_bounds_are_logged_and_nucleotides_are_refused(tmp_path, caplog):
    table = frame()[["id", "sequence", "label"]]
    with caplog.at_level(logging.INFO):
        data = load_sequences(write(table, tmp_path / "a.csv"), min_residues=15, max_residues=25)
    kept = table[table.sequence.str.len().between(15, 25)]
    assert set(rows_of(data)) == set(kept.id)
    assert f"{len(table) - len(kept)} sequence(s) outside" in caplog.text
    rng = np.random.default_rng(0)
    genes = table.assign(sequence=["".join(rng.choice(list("ACGT"), 30)) for _ in range(40)])
    with pytest.raises(DataError, match=r"40 of 40 sequences consist of the letters A, C, G, T.*translate them first"):
        load_sequences(write(genes, tmp_path / "b.csv"))
    load_sequences(write(pd.concat([table.assign(id="Q"), genes[:3]]), tmp_path / "c.csv"))
    assert "3 sequence(s) may be nucleotides, not proteins: P0, P1, P2" in caplog.text


def test_a_split_that_the_bounds_empty_is_an_error(tmp_path):
    table = frame()
    files = {
        "train": write(table, tmp_path / "train.csv"),
        "test": write(table.assign(sequence="MKTV" * 50, id="T")[:1], tmp_path / "test.csv"),
    }
    with pytest.raises(DataError, match="no sequence of test is within the bounds"):
        load_sequences(files, label="golgi", max_residues=50)


def test_notes_are_never_half_written(tmp_path, table_cache, monkeypatch):
    """Another rank may read them at any moment, and a process that died would leave them so."""
    path = write(frame(), tmp_path / "a.csv")
    written = []
    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda file, content: written.append(file) or real(file, content))
    load_sequences(path, label="label")
    [notes] = (table_cache / "tables").glob("*.json")
    assert written
    assert notes not in written
    assert not list((table_cache / "tables").glob("*.notes*"))


def test_rows_are_in_the_order_of_the_file_unless_they_are_shuffled(tmp_path):
    table = frame()
    path = write(table, tmp_path / "a.csv")
    found = {flag: load_sequences({"test": path}, label="label", split=False, shuffle=flag) for flag in (True, False)}
    assert found[False]["test"]["sequence"] == table["sequence"].tolist() != found[True]["test"]["sequence"]
    assert sorted(found[True]["test"]["sequence"]) == sorted(table["sequence"])


def test_loaded_rows_stay_the_same_when_files_and_labels_change(tmp_path, table_cache):
    table = frame()
    path = write(table, tmp_path / "a.csv")
    first, again = load_sequences(path, label="label"), load_sequences(path, label="label")
    assert len([p for p in (table_cache / "tables").glob("*.arrow") if not p.name.startswith("cache-")]) == 1
    assert rows_of(first) == rows_of(again)
    before = rows_of(first)
    write(frame(seed=2), path)
    assert rows_of(load_sequences(path, label="label")) != before
    # A pickled dataset opens the cached file again, by its name.
    assert rows_of(pickle.loads(pickle.dumps(first))) == before

    sequences = fasta(table, tmp_path / "a.fasta")
    labels = [
        write(table[["id"]].assign(label=words), tmp_path / f"{words[0]}.csv")
        for words in (["a", "b"] * 20, ["b", "a"] * 20)
    ]
    one, other = (load_sequences(sequences, labels=file) for file in labels)
    assert [row["label"] for row in pickle.loads(pickle.dumps(one["train"]))] == one["train"]["label"][:]
    swapped = {name: 1 - row["label"] for name, row in rows_of(other).items()}
    assert {name: row["label"] for name, row in rows_of(one).items()} == swapped
