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


def test_repeats_with_different_labels_are_counted_for_labels_of_every_kind(caplog):
    for labels in ([0, 1, 1, 1, 0], ["a", "b", "b", "b", "a"], [[0], [1], [1], [1], [0]], [0.5, 1.5, 1.5, 1.5, 0.5]):
        caplog.clear()
        train = rows(["MK", "MK", "MV", "MV", "MK"]).add_column("label", labels)
        check_leaks({"train": train, "test": rows(["MA"]).add_column("label", labels[:1])})
        assert (
            "3 sequence(s) occur more than once within their split, 1 of them with another label: P0 and P1"
            in caplog.text
        )
    caplog.clear()
    check_leaks({"train": rows(["MK", "MK"]).add_column("label", [{"a": 1.0}, {"a": 1.0}])})
    assert "1 sequence(s) occur more than once within their split" in caplog.text
    assert "another label" not in caplog.text
