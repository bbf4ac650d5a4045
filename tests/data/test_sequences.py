"""Cleaning and shortening."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_efficient.data.sequences import RESIDUES, clean, truncate
from esm_efficient.errors import ConfigurationError

residues = st.text(alphabet=RESIDUES, max_size=60)


@pytest.mark.parametrize(
    ("keep", "size", "expected"),
    [
        ("start", 3, "ABC"),
        ("end", 3, "EFG"),
        ("both", 3, "ABG"),
        ("both", 4, "ABFG"),
        ("both", 1, "A"),
        ("start", 7, "ABCDEFG"),
        ("both", 9, "ABCDEFG"),
    ],
)
def test_what_is_kept(keep, size, expected):
    assert truncate("ABCDEFG", size, keep) == expected


@given(residues, st.integers(1, 70), st.sampled_from(["start", "end", "both"]))
def test_length_is_the_smaller_and_the_ends_stay(sequence, size, keep):
    kept = truncate(sequence, size, keep)
    assert len(kept) == min(size, len(sequence))
    if keep != "end":
        assert sequence.startswith(kept[: (len(kept) + 1) // 2])
    if keep != "start" and len(kept) > 1:
        assert sequence.endswith(kept[-(len(kept) // 2) :])


@given(residues)
def test_cleaning_folds_case_and_white_space_only(sequence):
    assert clean(" ".join(sequence.lower()) + "\n") == sequence
    assert clean(clean(sequence)) == clean(sequence)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigurationError, match="start, end, both"):
        truncate("ABC", 2, "middle")
    with pytest.raises(ConfigurationError, match="at least one"):
        truncate("ABC", 0)
