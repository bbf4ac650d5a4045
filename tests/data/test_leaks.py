"""Sequences in two splits are an error; repeats within a split are counted."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from esm_efficient.data.leaks import check_leaks
from esm_efficient.errors import DataError


def rows(sequences):
    return Dataset.from_dict({"sequence": list(sequences), "accession": [f"P{i}" for i in range(len(sequences))]})


def test_a_sequence_in_two_splits_is_an_error_and_repeats_in_a_split_are_counted(caplog):
    parts = {"train": rows(["MK", "MV", "MV"]), "validation": rows(["MA"]), "test": rows(["MC", "MK"])}
    with pytest.raises(DataError, match=r"1 sequence\(s\) are in two splits.*P0 = P1 \(train and test\)"):
        check_leaks(parts)
    with caplog.at_level(logging.WARNING):
        check_leaks({"train": parts["train"], "validation": parts["validation"]})
    assert "1 sequence(s) occur more than once" in caplog.text
