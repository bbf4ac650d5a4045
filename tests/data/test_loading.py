"""load_sequences: files of every format and content, and the errors of wrong ones."""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import os
import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, List, Value
from pyarrow import parquet
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_deeploc, load_sequences, tokenize_dataset
from esm_efficient.errors import ConfigurationError, DataError, EsmEfficientError

pytestmark = pytest.mark.filterwarnings("ignore:A random split")
LETTERS = list("ACDEFGHIKLMNPQRSTVWY")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frame(rows=40, *, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    sequences = ["".join(rng.choice(LETTERS, int(n))) for n in rng.integers(10, 30, rows)]
    return pd.DataFrame(
        {
            "id": [f"P{i}" for i in range(rows)],
            "sequence": sequences,
            "label": [("soluble", "membrane")[i % 3 == 0] for i in range(rows)],
            "stability": [f"{value:.3f}" for value in rng.normal(size=rows)],
            "structure": ["".join("HE"[r in "AILMFVWY"] for r in s) for s in sequences],
            "nucleus": [("0", "1", "")[i % 3] for i in range(rows)],
            "golgi": [("1.0", "0.0")[i % 2] for i in range(rows)],
            "fold": [i % 5 for i in range(rows)],
        }
    )


def rows_of(data) -> dict[str, dict]:
    return {row["accession"]: row for split in data.values() for row in split}


def write(table: pd.DataFrame, path):
    if path.name.endswith(".parquet"):
        table.to_parquet(path)
        return path
    text = table.to_csv(index=False, sep="\t" if ".tsv" in path.name else ",")
    packer = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packer(text.encode()))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.xz", "a.parquet"])
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
    parquet.write_table(pa.table(columns | {"label": np.linspace(0, 1, len(table))}), tmp_path / "b.parquet")
    assert load_sequences(tmp_path / "b.parquet")["train"].features["label"] == Value("float32")


def fasta(table: pd.DataFrame, path):
    path.write_text(
        "".join(
            f">{r.id} class={r.label} fold={r.fold}\n{r.sequence[:8]}\n{r.sequence[8:]}\n" for r in table.itertuples()
        )
    )
    return path


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
    with pytest.raises(DataError, match=r"1 sequence\(s\) have no label.*record 3 \(P2\)"):
        load_sequences(path, labels=write(table[table.id != "P2"], tmp_path / "few.csv"), label="label")
    with pytest.raises(DataError, match=r"does not match.*record 3 \(P2\)"):
        load_sequences(path, header=r"class=(?P<label>\w+) fold=[^2]")
    for header, message in (("(", "not a regular expression"), ("class", "no named group")):
        with pytest.raises(ConfigurationError, match=message):
            load_sequences(path, header=header)


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
    ("change", "options", "message"),
    [
        (lambda t: t.rename(columns={"sequence": "text"}), {}, "no column with a usual name of sequences.*id, text"),
        (
            lambda t: t.assign(Seq=t.sequence),
            {},
            "sequence could be any of 'sequence', 'Seq'.*with sequence=",
        ),
        (lambda t: t.assign(target=1), {}, "label could be any of 'label', 'target'"),
        (lambda t: t, {"label": "absent"}, "no column 'absent'; it has id, sequence"),
        (lambda t: t, {"label": ["golgi", "absent"]}, "no column 'absent'"),
        (lambda t: t, {"label": "fold"}, "whole number in every row.*label_kind"),
        (lambda t: put(t, "sequence", " -* "), {}, r"the sequence is empty in 1 row\(s\): .*line 4"),
        (lambda t: put(t, "sequence", "MK1V"), {}, "not letters in 1 row.*line 4: 'MK1V'"),
        (lambda t: put(t, "sequence", "MK*V"), {}, r"not letters in 1 row.*line 4: 'MK\*V'"),
        (lambda t: put(t, "label", ""), {}, "the label is missing in 1 row.*line 4"),
        (lambda t: put(t, "stability", "NA"), {"label": "stability"}, "a number in .*line 2.*not in .*line 4: 'NA'"),
        (
            lambda t: put(t, "stability", "x"),
            {"label": "stability", "label_kind": "number"},
            "not a finite number in .*line 4",
        ),
        (
            lambda t: put(t, "structure", "HE"),
            {"label": "structure", "label_kind": "residues"},
            "1 row.*label count differs from residue count.*line 4: 2 labels for",
        ),
        (
            lambda t: put(t, "golgi", "2"),
            {"label": ["nucleus", "golgi"]},
            "golgi label is neither 0 nor 1.*line 4: '2'",
        ),
        (lambda t: put(t, "fold", "x"), {"partition": "fold"}, "fold is not a whole number in 1 row.*line 4: 'x'"),
        (lambda t: t.assign(split="later"), {}, "split is not train, validation or test in 40 row.*and 35 more"),
        (lambda t: put(t.assign(w="1"), "w", "-1"), {"sample_weight": "w"}, "w is not a number >= 0 in 1 row.*line 4"),
        (lambda t: t[:0], {}, "no sequence is left"),
        (lambda t: t, {"min_residues": 1000}, "no sequence is left"),
    ],
)
def test_an_error_names_the_cell_or_the_column(tmp_path, change, options, message):
    table = frame().drop(columns=[] if "partition" in options or options.get("label") == "fold" else "fold")
    with pytest.raises(DataError, match=message):
        load_sequences(write(change(table.astype(str)), tmp_path / "a.csv"), **options)


def put(table, column, value):
    table.loc[2, column] = value
    return table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_kind": "words"}, "label_kind"),
        ({"label": [], "label_kind": None}, "expected columns of 0 and 1"),
        ({"label": ["golgi"], "label_kind": "class"}, "without a label_kind"),
        ({"test_size": 2}, "something to train on"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    path = write(frame(), tmp_path / "a.csv")
    with pytest.raises(ConfigurationError, match=message):
        load_sequences(path, **options)
    with pytest.raises(ConfigurationError, match="files for tests"):
        load_sequences({"train": path, "tests": path})


def test_sequences_left_out_and_nucleotides_are_logged(tmp_path, caplog):
    table = frame()[["id", "sequence", "label"]]
    with caplog.at_level(logging.INFO):
        data = load_sequences(write(table, tmp_path / "a.csv"), min_residues=15, max_residues=25)
    kept = table[table.sequence.str.len().between(15, 25)]
    assert set(rows_of(data)) == set(kept.id)
    assert f"{len(table) - len(kept)} sequence(s) outside" in caplog.text
    rng = np.random.default_rng(0)
    genes = table.assign(sequence=["".join(rng.choice(list("ACGT"), 30)) for _ in range(40)])
    load_sequences(write(genes, tmp_path / "b.csv"))
    assert "40 of 40 sequences contain only A, C, G, T, U and N" in caplog.text


def test_loaded_rows_stay_the_same_when_files_and_labels_change(tmp_path, cache):
    table = frame()
    path = write(table, tmp_path / "a.csv")
    first, again = load_sequences(path, label="label"), load_sequences(path, label="label")
    assert len([p for p in (cache / "tables").iterdir() if not p.name.startswith("cache-")]) == 1
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


def test_files_that_are_swapped_swap_the_splits(tmp_path):
    table = frame()
    one, other = write(table[:20], tmp_path / "one.csv"), write(table[20:], tmp_path / "other.csv")
    first = load_sequences({"train": one, "test": other}, label="label")
    second = load_sequences({"train": other, "test": one}, label="label")
    assert set(first["train"]["accession"]) == set(second["test"]["accession"]) == set(table.id[:20])


def test_a_split_that_the_bounds_empty_is_an_error(tmp_path):
    table = frame()
    files = {
        "train": write(table, tmp_path / "train.csv"),
        "test": write(table.assign(sequence="MKTV" * 50, id="T")[:1], tmp_path / "test.csv"),
    }
    with pytest.raises(DataError, match="no sequence of test is within the bounds"):
        load_sequences(files, label="golgi", max_residues=50)


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


def test_uniprot_names_match_accessions(tmp_path):
    table = frame()
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">sp|{row.id}|X_HUMAN words\n{row.sequence}\n" for row in table.itertuples()))
    clusters = tmp_path / "out.clstr"
    clusters.write_text("".join(f">Cluster {i}\n0\t20aa, >sp|P{i}|X_HUMAN... *\n" for i in range(40)))
    data = load_sequences(path, clusters=clusters)
    assert sum(map(len, data.values())) == 40


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
    "leave nothing for|stand in two splits|has the columns|whole number in every row|more than 1000 values|no file at|"
    "nothing is left"
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


def test_any_file_is_loaded_whole_or_the_error_names_the_row(tmp_path, caplog):
    """Set ESM_EFFICIENT_FUZZ=10000 for more cases."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    loaded, refused = 0, {}
    for case in range(int(os.environ.get("ESM_EFFICIENT_FUZZ", "250"))):
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
    assert loaded > 50
    assert not [item for item in refused.items() if not re.search(rf"(line|row|record) \d+|{STRUCTURAL}", item[1])]
