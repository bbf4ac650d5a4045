"""FASTA files with labels: below the sequences, in a second file, and in the headers."""

from __future__ import annotations

import io
import logging

import pytest
from datasets import ClassLabel, List
from sequence_files import frame, rows_of, write

from esm_efficient import load_sequences
from esm_efficient.data.fasta import read_fasta, read_fasta_table
from esm_efficient.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV"
LABELS = "SSSSSSSSSSSSSSSSOOOOOOOOOOOOOOOO"


def three_lines(table, path):
    """SignalP's and DeepTMHMM's format: header, residues, labels. Runs of labels, as topologies have."""
    records = []
    for row in table.itertuples():
        cut = len(row.sequence) // 2
        records.append(f">{row.id} | TM\n{row.sequence}\n{'S' * cut}{'O' * (len(row.sequence) - cut)}\n")
    path.write_text("".join(records))
    return path


def test_labels_below_the_sequences_are_labels_and_not_residues(tmp_path):
    table = frame()
    data = load_sequences(three_lines(table, tmp_path / "a.3line"))
    assert data["train"].features["label"] == List(ClassLabel(names=["O", "S"]))
    rows = rows_of(data)
    for row in table.itertuples():
        found = rows[row.id]
        cut = len(row.sequence) // 2
        assert (found["sequence"], found["residues"]) == (row.sequence, len(row.sequence))
        assert found["label"] == [1] * cut + [0] * (len(row.sequence) - cut)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([PROTEIN], False),
        ([PROTEIN, LABELS], True),
        ([PROTEIN, "0" * 20 + "1" * 12], True),
        ([PROTEIN, "-" * 20 + "T" * 12], True),
        ([PROTEIN, PROTEIN[::-1]], False),
        ([PROTEIN, LABELS[:-1]], False),
        (["A" * 32, "A" * 32], False),
        (["HHHHEEEE", "EEEECCCC"], False),
    ],
)
def test_a_second_line_is_labels_if_it_is_as_long_and_repeats_few_letters(body, expected):
    _, rows = read_fasta_table(io.StringIO(f">P1\n{chr(10).join(body)}\n"), "example")
    ((_, cells),) = rows
    assert list(cells[2:]) == (body if expected else ["".join(body)])


def test_labels_below_sequences_are_refused_where_they_cannot_be_told_or_used():
    wrapped = f">P1\n{PROTEIN[:16]}\n{PROTEIN[16:]}\n{LABELS[:16]}\n{LABELS[16:]}\n"
    with pytest.raises(DataError, match=r"record 1 \(P1\) seems to have labels below its sequence, in 4 lines"):
        read_fasta_table(io.StringIO(wrapped), "example")
    with pytest.raises(DataError, match="the request has labels below the sequences"):
        list(read_fasta([">P1\n", f"{PROTEIN}\n", f"{LABELS}\n"], "the request"))
    mixed = "".join(f">P{i}\n{PROTEIN}\n{LABELS}\n" for i in range(3)) + f">P3\n{PROTEIN}\n"
    _, rows = read_fasta_table(io.StringIO(mixed), "example")
    with pytest.raises(DataError, match=r"record 4 \(P3\): 1 line\(s\).*expected a line of residues and a line of"):
        list(rows)
    left_out = []
    _, rows = read_fasta_table(io.StringIO(mixed), "example", leave_out=lambda *row: left_out.append(row[0]))
    assert len(list(rows)) == 3
    assert left_out == ["example, record 4 (P3)"]


def test_labels_below_some_sequences_only_are_refused():
    with pytest.raises(DataError, match=r"1 of 2 records seem to have labels below the sequence, such as record 1"):
        read_fasta_table(io.StringIO(f">P1\n{PROTEIN}\n{LABELS}\n>P2\n{PROTEIN}\n"), "example")


def test_a_fasta_file_of_labels_is_joined_to_one_of_sequences(tmp_path):
    table = frame()
    sequences, labels = tmp_path / "sequences.fasta", tmp_path / "labels.fasta"
    sequences.write_text("".join(f">{row.id}\n{row.sequence}\n" for row in table.itertuples()))
    labels.write_text(
        "".join(f">{row.id} anything\n{row.structure[:9]}\n{row.structure[9:]}\n" for row in table.itertuples())
    )
    for source in (sequences, write(table[["id", "sequence"]], tmp_path / "a.csv")):
        data = load_sequences(source, labels=labels)
        assert data["train"].features["label"] == List(ClassLabel(names=["E", "H"]))
        rows = rows_of(data)
        for row in table.itertuples():
            assert ["EH"[label] for label in rows[row.id]["label"]] == list(row.structure)
    labels.write_text("".join(f">{row.id}\n{row.structure[1:]}\n" for row in table[:1].itertuples()))
    with pytest.raises(DataError, match="the second table has no label in 39"):
        load_sequences(sequences, labels=labels)


def test_the_splits_and_the_target_in_headers_are_read(tmp_path):
    table = frame()
    words = ["train"] * 20 + ["test"] * 20
    path = tmp_path / "flip.fasta"
    path.write_text(
        "".join(
            f">{r.id} TARGET={r.label} SET={word} VALIDATION={r.Index % 4 == 0 and word == 'train'}\n{r.sequence}\n"
            for r, word in zip(table.itertuples(), words, strict=True)
        )
    )
    data = load_sequences(path)
    assert {name: len(part) for name, part in data.items()} == {"train": 15, "validation": 5, "test": 20}
    assert data["train"].features["label"].names == ["membrane", "soluble"]
    # Two FASTA files, as FLIP writes labels of residues: the headers of the labels tell the split.
    sequences = tmp_path / "sequences.fasta"
    sequences.write_text("".join(f">{row.id}\n{row.sequence}\n" for row in table.itertuples()))
    path.write_text(
        "".join(
            f">{row.id} SET={word} VALIDATION=False\n{row.structure}\n"
            for row, word in zip(table.itertuples(), words, strict=True)
        )
    )
    data = load_sequences(sequences, labels=path)
    assert {name: set(part["accession"]) for name, part in data.items()} == {
        "train": set(table.id[:20]),
        "test": set(table.id[20:]),
    }


def test_headers_that_do_not_match_can_be_left_out_and_are_counted(tmp_path, caplog):
    table = frame()
    path = tmp_path / "a.fasta"
    path.write_text(
        "".join(
            f">{r.id} {'' if r.Index in (2, 5) else 'class=' + r.label}\n{r.sequence}\n" for r in table.itertuples()
        )
    )
    options = {"header": r"class=(?P<label>\w+)"}
    with pytest.raises(DataError, match=r"does not match .* in 2 record\(s\).*on_error=.skip"):
        load_sequences(path, **options)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = load_sequences(path, on_error="skip", **options)
        assert set(rows_of(data)) == set(table.id) - {"P2", "P5"}
        assert "left out 2 row(s), the header does not match" in caplog.text
        assert "record 3 (P2)" in caplog.text
        assert "record 6 (P5)" in caplog.text


def test_one_record_whose_second_line_is_a_repeat_is_one_sequence():
    for second in ("Q" * 32, "AG" * 4 + "GGGA" * 6, "Q" * 31 + "*"):
        _, rows = read_fasta_table(io.StringIO(f">P1\n{PROTEIN}\n{second}\n"), "example")
        assert [cells[2] for _, cells in rows] == [PROTEIN + second]


def test_keys_of_headers_may_be_absent_from_the_first():
    text = f">P1\n{PROTEIN}\n>P2 SET=test TARGET=1.5\n{PROTEIN}\n>P3 TARGET=2 FOLD=1\n{PROTEIN}\n"
    names, rows = read_fasta_table(io.StringIO(text), "example")
    assert names[3:] == ["SET", "TARGET", "FOLD"]
    assert [cells[3:] for _, cells in rows] == [["", "", ""], ["test", "1.5", ""], ["", "2", "1"]]


def test_a_value_in_a_header_ends_before_the_next_key():
    text = f">P1 TARGET=Cell membrane SET=train\n{PROTEIN}\n>P2 SET=test TARGET=Cell wall\n{PROTEIN}\n"
    names, rows = read_fasta_table(io.StringIO(text), "example")
    assert names[3:] == ["TARGET", "SET"]
    assert [cells[3:] for _, cells in rows] == [["Cell membrane", "train"], ["Cell wall", "test"]]


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("P9 SET=train VALIDATION=True", "the header has VALIDATION=, which none of the first 100"),
        ("P9 SET=train SET=test", "the header has SET= twice"),
    ],
)
def test_keys_that_would_be_lost_are_refused_or_left_out(header, problem):
    records = "".join(f">P{number} SET=train\n{PROTEIN}\n" for number in range(120))
    text = f"{records}>{header}\n{PROTEIN}\n"
    with pytest.raises(DataError, match=rf"example, record 121 .*: {problem}"):
        list(read_fasta_table(io.StringIO(text), "example")[1])
    left_out = []
    _, rows = read_fasta_table(io.StringIO(text), "example", leave_out=lambda *found: left_out.append(found))
    assert len(list(rows)) == 120
    assert [found[1].startswith(problem[:20]) for found in left_out] == [True]
