"""Columns are found and cells are checked; an error names the cell or the column."""

from __future__ import annotations

import pytest
from sequence_files import frame, put, rows_of, write

from esm_efficient import load_sequences
from esm_efficient.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore:A random split"), pytest.mark.usefixtures("table_cache")]


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
        (lambda t: put(t, "sequence", "NOT A PROTEIN"), {}, "looks like words in 1 row.*line 4: 'NOT A PROTEIN'"),
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
        (
            lambda t: t,
            {"label": ["stability", "nucleus"]},
            "stability label is neither 0 nor 1.*one column of numbers from a table, so name one of them. In Python",
        ),
        (
            lambda t: t,
            {"label": ["stability", "nucleus"], "on_error": "skip"},
            r"no sequence is left; left out 40 row.s., the stability label is neither 0 nor 1",
        ),
        *(
            (
                lambda t: t.assign(sequence=t.sequence + "--*", structure=t.structure + "-.-"),
                {"label": "structure"} | kind,
                "label count differs from residue count, first in .*line 2: 30 labels for 27 residues.*remove the "
                "labels at these columns too, which makes the numbers equal in 40 row",
            )
            for kind in ({}, {"label_kind": "residues"})
        ),
        (
            lambda t: t.assign(structure=t.structure.str[1:]),
            {"label": "structure"},
            "many for classes.* As labels of residues, their number is wrong: .*line 2: 26 labels for 27 resid",
        ),
        (lambda t: t, {"label": {"a|b": "golgi"}}, r"the label name 'a\|b' has a \|.*: rename it"),
        (
            lambda t: t.assign(label="['a|b', 'c']"),
            {"label_kind": "several"},
            r"the label name 'a\|b' has a \|, which separates several labels: rename it",
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


def test_a_written_mask_is_one_residue(tmp_path):
    table = put(frame(), "sequence", "MKTA<mask>YIAKQR")
    table.loc[2, "structure"] = "HHHEEEHHHEE"
    data = load_sequences(write(table.drop(columns="fold"), tmp_path / "a.csv"), label="structure")
    row = rows_of(data)["P2"]
    assert (row["sequence"], row["residues"], len(row["label"])) == ("MKTA<mask>YIAKQR", 11, 11)
