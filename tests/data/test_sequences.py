"""Cleaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_efficient.data.sequences import RESIDUES, NucleotideCount, clean, is_nucleotides
from esm_efficient.errors import DataError


@given(st.text(alphabet=RESIDUES, max_size=60))
def test_cleaning_folds_case_and_white_space(sequence):
    assert clean(" ".join(sequence.lower()) + "\n") == sequence


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text):
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MK-TV..", "MKTV"),
        ("MKTV*", "MKTV"),
        ("MKTV* \n", "MKTV"),
        ("M*KT**", "M*KT"),
        ("*", ""),
        ("mß1", "Mß1"),
        ("mk<MASK>t<mask>*", "MK<mask>T<mask>"),
        ("<mä", "<Mä"),
    ],
)
def test_gaps_and_final_stops_go_and_the_rest_stays(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ACGTACGTAC", True),
        ("acgu-acgu\nACGU", True),
        ("ACGTNNNNNNNNNN*", True),
        ("ACGTACGTA", False),
        ("ACGTACGTAM", False),
        ("MCGTACGTACGTACGTACGT", False),
        ("AAAAAAAAAAAAAAAAAAAA", False),
        ("GAGAGAGAGAGAGAGAGANN", False),
        ("", False),
    ],
)
def test_nucleotides_are_told_from_peptides(text, expected):
    assert is_nucleotides(text) is expected


GENE = "ATGGCCCTGTGGATGCGC"


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (["MKTAYIAKQR"], ""),
        (["ACGT"], ""),
        ([GENE], "1 sequence(s) may be nucleotides, not proteins: p0"),
        ([GENE, "MKTAYIAKQR", "MALWMRLLPL", GENE], "2 sequence(s) may be nucleotides, not proteins: p0, p3"),
        (
            [*["MKT"] * 7, *[GENE] * 7],
            "7 sequence(s) may be nucleotides, not proteins: p7, p8, p9, p10, p11 and 2 more",
        ),
    ],
)
def test_single_nucleotides_are_a_warning(sequences, message):
    count = NucleotideCount()
    count.add(sequences, [f"p{i}" for i in range(len(sequences))])
    assert count.warning("a.csv") == message


@pytest.mark.parametrize("sequences", [[GENE * 2], [GENE, GENE, "MKT"]])
def test_mostly_nucleotides_are_refused(sequences):
    count = NucleotideCount()
    count.add(sequences, [f"p{i}" for i in range(len(sequences))])
    with pytest.raises(DataError, match=r"a.csv: \d of \d sequences consist of the letters A, C.*p0.*translate them"):
        count.warning("a.csv")
