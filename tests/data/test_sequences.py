"""Cleaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_efficient.data.sequences import RESIDUES, clean


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
