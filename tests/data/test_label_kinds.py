"""The kind of label follows from the cells, or an error says why it does not."""

from __future__ import annotations

import json
import logging
import re
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, List, Value
from pyarrow import parquet
from sequence_files import frame, put, rows_of, write
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_sequences, tokenize_dataset
from esm_efficient.errors import ConfigurationError, DataError

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


SITES = ["".join("01"[letter in "AILMFVWY"] for letter in sequence) for sequence in frame().sequence]


@pytest.mark.parametrize(
    ("write_labels", "expected"),
    [
        (lambda s: str([int(c) for c in s]), "01"),  # what pandas writes of a list
        (lambda s: str([float(c) for c in s]), "01"),
        (lambda s: str(np.array([int(c) for c in s])), "01"),
        (lambda s: str(list(s)), "01"),
        (lambda s: " ".join("EH"[int(c)] for c in s), "EH"),
        (lambda s: ",".join(s), "01"),
        (lambda s: ";".join("EH"[int(c)] for c in s), "EH"),
        (lambda s: s, "01"),
        (lambda s: f"{s[:5]} {s[5:]}", "01"),
    ],
)
def test_labels_of_residues_are_read_from_usual_texts(tmp_path, write_labels, expected):
    table = frame().assign(label=[write_labels(sites) for sites in SITES])
    data = load_sequences(write(table, tmp_path / "a.csv"))
    assert data["train"].features["label"] == List(ClassLabel(names=list(expected)))
    rows = rows_of(data)
    assert [rows[name]["label"] for name in table.id] == [[int(c) for c in sites] for sites in SITES]


def test_long_texts_of_0_and_1_raise_no_warning_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    table = frame().assign(sequence=["".join(rng.choice(list("MKTV"), int(n))) for n in rng.integers(36, 400, 40)])
    table["label"] = ["".join("01"[letter == "M"] for letter in sequence) for sequence in table.sequence]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        data = load_sequences(write(table, tmp_path / "a.csv"))
    assert data["train"].features["label"] == List(ClassLabel(names=["0", "1"]))


def cycle(*words, rows=40):
    return [words[i % len(words)] for i in range(rows)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([f"{i},{i + 9},{i + 17}" for i in range(40)], "several numbers in .*line 2: '0,9,17'.*label_kind=.positions"),
        (cycle("12", "12 40", "7"), "several numbers in .*line 3: '12 40'"),
        (cycle("0,37", "12,5"), "two numbers with a comma.*decimal comma as a point"),
        (cycle("[0, 1, 0]", "[1, 1, 0]"), "list in every row.*line 2: 3 labels for.*one column per label"),
        (cycle("['Nucleus']", "['Nucleus', 'Golgi']"), "list in every row.*label_kind=.several"),
        (cycle("Cytoplasm", "Cytoplasm|Nucleus"), "several labels.*line 3: 'Cytoplasm.Nucleus'.*label_kind=.several"),
        (cycle("Nucleus", "Cell membrane; Multi-pass"), "several labels.*label_kind=.several"),
        (cycle("Cytoplasm", "Nucleus", "Cytoplasm, Nucleus"), "several labels.*line 4: 'Cytoplasm, Nucleus'"),
        (cycle("ER", "ER/Golgi"), "several labels.*line 3: 'ER/Golgi'"),
        (cycle("yes", "no", "NA"), r"may be missing in .*line 4: 'NA'. Correct the row.*on_error"),
        (cycle("yes", "no", "-"), "may be missing in .*line 4: '-'"),
        ([f"family {i // 2}" for i in range(40)], "20 different values in 40 rows.*'family 0'.*label_kind=.class"),
        (["soluble", "membrane", *[f"{i} nM" for i in range(38)]], "40 different values in 40 rows"),
        (cycle("soluble " * 40, "membrane"), "more than 200 characters in .*line 2"),
    ],
)
def test_cells_that_are_unlikely_to_be_classes_are_asked_about(tmp_path, labels, message):
    path = write(frame().assign(label=labels), tmp_path / "a.csv")
    with pytest.raises(DataError, match=message):
        load_sequences(path)


@pytest.mark.parametrize(
    "labels",
    [
        cycle("Cytoplasm", "Cytoplasm|Nucleus"),
        cycle("yes", "Yes", "no"),
        cycle("yes", "no", "NA"),
        [f"family {i // 2}" for i in range(40)],
        cycle("0,37", "12,5"),
    ],
)
def test_the_user_may_say_that_they_are_classes(tmp_path, labels):
    data = load_sequences(write(frame().assign(label=labels), tmp_path / "a.csv"), label_kind="class")
    assert data["train"].features["label"].names == sorted(set(labels))


@pytest.mark.parametrize(
    ("labels", "names", "note"),
    [
        (cycle("yes", "Yes", "yes", "no"), ["no", "yes"], "'Yes' as 'yes'"),
        (cycle("Yes", "yes ", "YES", "No", "Yes", "no", "no"), ["Yes", "no"], "'No' as 'no', 'YES' as 'Yes', .*"),
        (cycle("non-membrane", "Non membrane", "non-membrane", "no"), ["no", "non-membrane"], "'Non membrane' as .*"),
    ],
)
def test_spellings_of_a_class_are_one_class_named_by_the_most_frequent(tmp_path, caplog, labels, names, note):
    table = frame().assign(label=labels)
    data = load_sequences(write(table, tmp_path / "a.csv"))
    assert data["train"].features["label"].names == names
    rows = rows_of(data)
    read = [names[rows[name]["label"]].casefold() for name in table.id]
    assert read == [label.strip().casefold().replace("non membrane", "non-membrane") for label in labels]
    assert re.search(
        f"several spellings are read as one class: {note}. To keep them apart, pass label_kind", caplog.text
    )


def test_a_class_with_one_row_in_each_of_two_spellings_is_not_rare(tmp_path, caplog):
    labels = [*cycle("a", "b", rows=36), "c", "C", "d", "d"]
    load_sequences(write(frame().assign(label=labels), tmp_path / "a.csv"))
    assert "'C' as 'c'" in caplog.text or "'c' as 'C'" in caplog.text
    assert "single row" not in caplog.text


@pytest.mark.parametrize("labels", [cycle("1", "-1"), cycle("A+", "A-", "A"), cycle("a b", "ab")])
def test_texts_that_differ_in_signs_are_classes_of_their_own(tmp_path, labels):
    data = load_sequences(
        write(frame().assign(label=labels), tmp_path / "a.csv"), label_kind=None if "A" in "".join(labels) else "class"
    )
    assert len(data["train"].features["label"].names) == len(set(labels))


@pytest.mark.parametrize(
    "labels",
    [
        cycle("Lysosome/Vacuole", "Cell membrane", "Golgi apparatus"),
        cycle("yes ", "yes", "no"),
        cycle("True", "False"),
        cycle(*[f"class {i}" for i in range(10)]),
    ],
)
def test_classes_are_read_without_a_question(tmp_path, labels):
    data = load_sequences(write(frame().assign(label=labels), tmp_path / "a.csv"))
    assert data["train"].features["label"].names == sorted({label.strip() for label in labels})


def test_three_rows_of_two_classes_are_enough(tmp_path):
    table = frame(rows=3).assign(split=["train", "train", "test"], label=["a", "b", "a"])
    assert load_sequences(write(table, tmp_path / "a.csv"))["train"].features["label"].names == ["a", "b"]


def test_the_limit_of_classes_grows_with_the_rows(tmp_path):
    table = frame(rows=1000)[["id", "sequence"]]
    names = load_sequences(
        write(table.assign(label=cycle(*[f"c{i}" for i in range(100)], rows=1000)), tmp_path / "a.csv")
    )
    assert len(names["train"].features["label"].names) == 100
    with pytest.raises(DataError, match="101 different values in 1000 rows"):
        load_sequences(write(table.assign(label=cycle(*[f"c{i}" for i in range(101)], rows=1000)), tmp_path / "b.csv"))


@pytest.mark.parametrize(
    "labels",
    [
        cycle("Cytoplasm", "Cell membrane|Nucleus", "Nucleus"),
        cycle("Cytoplasm", "Nucleus; Cell membrane", "Nucleus;"),
        cycle("['Cytoplasm']", "['Cell membrane', 'Nucleus']", "['Nucleus']"),
    ],
)
def test_several_labels_in_a_cell_become_a_number_each(tmp_path, labels):
    table = frame().assign(label=labels)
    data = load_sequences(write(table, tmp_path / "a.csv"), label_kind="several")
    assert data["train"].features["label"] == dict.fromkeys(("Cell membrane", "Cytoplasm", "Nucleus"), Value("float32"))
    rows = rows_of(data)
    expected = [
        {"Cell membrane": b, "Cytoplasm": a, "Nucleus": c} for a, b, c in cycle((1, 0, 0), (0, 1, 1), (0, 0, 1))
    ]
    assert [rows[name]["label"] for name in table.id] == expected


def test_lists_of_names_in_parquet_are_several_labels(tmp_path):
    table = frame()
    columns = {"id": table.id, "sequence": table.sequence, "label": cycle(["a"], ["b", "c"])}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = rows_of(load_sequences(tmp_path / "a.parquet", label_kind="several"))
    assert rows["P1"]["label"] == {"a": 0.0, "b": 1.0, "c": 1.0}
    with pytest.raises(DataError, match=r"list in every row.*label_kind=.several"):
        load_sequences(tmp_path / "a.parquet")


@pytest.mark.parametrize("mark", ["-", "?", "."])
def test_a_mark_of_residues_without_a_label_is_asked_about(tmp_path, mark):
    table = frame()
    table["label"] = [f"{text[:3]}{mark}{text[4:]}" for text in table.structure]
    path = write(table, tmp_path / "a.csv")
    with pytest.raises(DataError, match=rf"label of a residue is '\{mark}', first in .*line 2. Pass unlabelled="):
        load_sequences(path)
    assert load_sequences(path, unlabelled="")["train"].features["label"].feature.names == [mark, "E", "H"]
    data = load_sequences(path, unlabelled=mark)
    assert data["train"].features["label"].feature.names == ["E", "H"]
    assert all(label[3] is None and None not in label[:3] + label[4:] for label in data["train"]["label"])
    tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    assert all(label[4] == -100 for label in tokenized["train"]["labels"])
    with pytest.raises(DataError, match="no residue has this label"):
        load_sequences(path, unlabelled="~")
    with pytest.raises(ConfigurationError, match="unlabelled='-' is for labels per residue"):
        load_sequences(path, label="stability", unlabelled="-")


def test_what_transformers_ignores_is_no_class_of_residues(tmp_path):
    table = frame()
    columns = {"id": table.id, "sequence": table.sequence, "label": [[-100] + [0, 1] * 20 for _ in table.id]}
    columns["label"] = [
        label[: len(sequence)] for label, sequence in zip(columns["label"], table.sequence, strict=True)
    ]
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load_sequences(tmp_path / "a.parquet")
    assert data["train"].features["label"] == List(ClassLabel(names=["0", "1"]))
    assert all(label[0] is None for label in data["train"]["label"])


def test_a_class_with_one_row_is_a_warning_that_names_it(tmp_path, caplog):
    path = write(put(frame().assign(label=cycle("yes", "no")), "label", "maybe"), tmp_path / "a.csv")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_sequences(path)
        assert "1 class(es) have a single row, which may be a slip: 'maybe' (" in caplog.text
        assert "a.csv, line 4)" in caplog.text


def test_a_single_class_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_sequences(write(frame().assign(label="membrane"), tmp_path / "a.csv"))
    assert "the label is 'membrane' in every row" in caplog.text


@pytest.mark.parametrize(
    ("column", "value", "options", "problem"),
    [
        ("sequence", "", {}, "the sequence is empty"),
        ("sequence", "MK1V", {}, "the sequence contains characters that are not letters"),
        ("label", "", {}, "the label is missing"),
        ("label", "NA", {}, "the label does not fit 'class'"),
        ("stability", "NA", {"label": "stability"}, "the label does not fit 'number'"),
        ("structure", "HE", {"label": "structure"}, "the label does not fit 'residues'"),
        ("golgi", "2", {"label": ["nucleus", "golgi"]}, "the golgi label is neither 0 nor 1"),
        ("golgi", "x", {"label": "golgi"}, "the label does not fit 'class'"),
        ("fold", "x", {}, "fold is not a whole number"),
    ],
)
def test_a_wrong_row_can_be_left_out_and_is_counted(tmp_path, caplog, column, value, options, problem):
    table = put(frame().astype(str), column, value)
    path = write(table, tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"line 4"):
        load_sequences(path, **options)
    with caplog.at_level(logging.WARNING):
        data = load_sequences(path, on_error="skip", **options)
    assert set(rows_of(data)) == set(table.id) - {"P2"}
    assert f"left out 1 row(s), {problem}: " in caplog.text
    assert ("line 4" in caplog.text) or ("P2" in caplog.text)


def test_an_unknown_on_error_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="on_error='ignore'"):
        load_sequences(write(frame(), tmp_path / "a.csv"), on_error="ignore")


@pytest.mark.parametrize(
    ("cells", "sites"),
    [
        (("1,3", "[]", "[2, 20]", "5;4", "7 8"), ([1, 3], [], [2, 20], [4, 5], [7, 8])),
        (("1", "3.0", "(2,)", "20", "1|2"), ([1], [3], [2], [20], [1, 2])),
        (([1, 3], [], [2, 20], [4], [7]), ([1, 3], [], [2, 20], [4], [7])),
    ],
)
def test_positions_become_labels_of_residues(tmp_path, cells, sites):
    rows = {
        "accession": list("abcde"),
        "sequence": [letter + "KTVAYIAKQ" * 2 + "M" for letter in "ACDEF"],
        "sites": list(cells),
    }
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    data = load_sequences(tmp_path / "a.parquet", label="sites", label_kind="positions", test_size=0.3)
    assert data["train"].features["label"] == List(ClassLabel(names=["0", "1"]))
    found = {name: np.flatnonzero(row["label"]) + 1 for name, row in rows_of(data).items()}
    assert {name: row.tolist() for name, row in found.items()} == dict(zip("abcde", map(list, sites), strict=True))


def test_positions_do_not_count_gaps_which_is_noted(tmp_path, caplog):
    rows = pd.DataFrame({"accession": list("abcde"), "sequence": ["MK-TV", "M.KTV", "MKTVV", "M-KTA", "-MK"]})
    path = write(rows.assign(sites=["3", "[]", "3", "1", "1"]), tmp_path / "a.csv")
    data = load_sequences(path, label="sites", label_kind="positions", test_size=0.25, min_residues=4)
    assert {name: row["label"][2] for name, row in rows_of(data).items()} == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert "2 sequence(s) with sites have gaps: a, d. The positions count residues, and no gaps" in caplog.text


@pytest.mark.parametrize(
    ("letters", "note"),
    [("HHEC", ""), ("HHeEC", "'e' as 'E'|'E' as 'e'")],
)
def test_two_spellings_of_a_class_of_residues_are_noted_and_stay_two(tmp_path, caplog, letters, note):
    table = frame()
    table["label"] = [(letters * 40)[: len(sequence)] for sequence in table.sequence]
    data = load_sequences(write(table, tmp_path / "a.csv"))
    assert data["train"].features["label"].feature.names == sorted({*letters})
    found = re.search("classes of residues may be one class in several spellings: (.*)", caplog.text)
    assert (found is not None) == bool(note)
    assert found is None or re.fullmatch(note, found[1])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("K2; L5", r"not a whole number in 1 row\(s\): .*line 3: 'K2; L5'. Write the number alone: 2 for K2"),
        ("0,5", r"position is outside of the sequence in 1 row\(s\): .*line 3: '0,5'. The first residue is position 1"),
        ("5,21", "position is outside of the sequence in .*line 3: '5,21'"),
        ("-1", "position is outside of the sequence in .*line 3"),
        ("5,7,5", "position is given twice in .*line 3: '5,7,5'"),
        ("5.5", "position is not a whole number in .*line 3: '5.5'"),
        ("NA", "position is not a whole number in .*line 3"),
        ("5-7", "position is not a whole number in .*line 3"),
        ("", r"positions are missing in .*line 3.* Write \[\] for no site"),
    ],
)
def test_wrong_positions_name_their_row_or_are_left_out(tmp_path, cell, message):
    table = frame().assign(sites="3,10")
    table["sequence"] = [sequence[:20] for sequence in table.sequence]
    table.loc[1, "sites"] = cell
    path = write(table[["id", "sequence", "sites"]], tmp_path / "a.csv")
    options = {"label": "sites", "label_kind": "positions"}
    with pytest.raises(DataError, match=message):
        load_sequences(path, **options)
    data = load_sequences(path, on_error="skip", **options)
    assert set(rows_of(data)) == set(table.id) - {table.id[1]}


def peptides(labels, length=8):
    """One random peptide of one length per label."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), (len(labels), length))
    return pd.DataFrame({"sequence": ["".join(row) for row in letters], "label": labels})


@pytest.mark.parametrize(
    ("labels", "length", "kind"),
    [
        (["positive", "negative"] * 20, 8, "class"),
        (["cleaved", "uncleav"] * 20, 7, "class"),
        ([f"{value / 61:.7f}" for value in range(60)], 9, "number"),
        ([f"{value:.1f}" for value in range(10, 50)], 4, "number"),
    ],
)
def test_labels_that_are_as_long_as_all_peptides_are_asked_about(tmp_path, labels, length, kind):
    path = write(peptides(labels, length), tmp_path / "t.csv")
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=rf'line 2: .*pass label_kind="{kind}" .* or label_kind="residues"'):
            load_sequences(path, on_error=on_error)
    feature = load_sequences(path, label_kind=kind)["train"].features["label"]
    assert feature == (Value("float32") if kind == "number" else ClassLabel(names=sorted(set(labels))))
    unlabelled = "" if kind == "class" else "."
    assert isinstance(load_sequences(path, unlabelled=unlabelled)["train"].features["label"], List)


def test_most_peptides_of_one_length_are_asked_about_too(tmp_path):
    table = pd.concat([peptides(["positive", "negative"] * 15), peptides(["positive", "negative"] * 5, 9)])
    with pytest.raises(DataError, match='pass label_kind="class"'):
        load_sequences(write(table, tmp_path / "t.csv"), on_error="skip")


def test_different_labels_of_the_residues_of_peptides_are_not_asked_about(tmp_path):
    table = peptides(["x"] * 40, 15)
    table["label"] = [sequence.translate(str.maketrans(dict.fromkeys("AILMFVWY", "H"))) for sequence in table.sequence]
    assert isinstance(load_sequences(write(table, tmp_path / "t.csv"))["train"].features["label"], List)


@pytest.mark.parametrize(("column", "cell"), [("golgi", "NA"), ("stability", "NaN"), ("stability", "unknown")])
def test_a_missing_label_among_numbers_names_skip(tmp_path, column, cell):
    path = write(put(frame(), column, cell), tmp_path / "t.csv")
    with pytest.raises(DataError, match=rf"not in .*line 4: '{cell}'. Correct the row, leave .*on_error=\"skip\""):
        load_sequences(path, label=column)
    with pytest.raises(DataError, match=rf"not a finite number in .*line 4: '{cell}'. .*on_error=\"skip\""):
        load_sequences(path, label=column, label_kind="number")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("kind", [None, "positions"])
def test_missing_positions_are_not_to_be_left_out(tmp_path, name, kind):
    sites = [[1, 3], None, [2, 7]] * 10
    cells = sites if name == "t.parquet" else ["" if cell is None else ",".join(map(str, cell)) for cell in sites]
    path = write(frame(30).assign(label=cells), tmp_path / name)
    advice = r"Write \[\] for no site" if kind else r'label_kind="positions" and write \[\] for no site'
    with pytest.raises(DataError, match=rf"missing in 10 row\(s\).*{advice}") as error:
        load_sequences(path, label="label", label_kind=kind)
    assert "skip" not in str(error.value).split("for no site")[0]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_several_labels_that_were_written_to_a_file_are_read_again(tmp_path, name):
    data = load_sequences(write(frame(), tmp_path / "t.csv"), label=["nucleus", "golgi"])
    rows = rows_of(data)
    table = pd.concat([split.to_pandas() for split in data.values()])
    again = load_sequences(write(table.drop(columns="residues"), tmp_path / name))
    assert again["train"].features["label"] == data["train"].features["label"]
    assert {name: row["label"] for name, row in rows_of(again).items()} == {n: row["label"] for n, row in rows.items()}
    assert any(None in row["label"].values() for row in rows.values())
    with pytest.raises(DataError, match=r"the label has named values, .* but is class"):
        load_sequences(tmp_path / name, label_kind="class")


def test_a_struct_with_a_value_that_is_no_label_names_the_row(tmp_path):
    path = tmp_path / "t.jsonl"
    labels = [{"a": 0, "b": 1}, {"a": 1}, {"a": 2, "b": 0}, {"c": 1}, None]
    sequences = frame(5).sequence
    path.write_text(
        "".join(json.dumps({"sequence": s, "label": x}) + "\n" for s, x in zip(sequences, labels, strict=True))
    )
    with pytest.raises(DataError, match=r"the names of the label are not a, b, c in 1 row\(s\): .*line 5"):
        load_sequences(path)
