"""Groups stay whole, clusters are read as their programs write them, and leaks are found."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esm_efficient.data.leaks import check_leaks
from esm_efficient.data.splits import read_clusters, sequence_groups, split_by_group
from esm_efficient.errors import ConfigurationError, DataError


def rows(sequences):
    return Dataset.from_dict({"sequence": list(sequences), "accession": [f"P{i}" for i in range(len(sequences))]})


@given(st.lists(st.integers(0, 12), min_size=3, max_size=60), st.integers(0, 5), st.sampled_from([0.0, 0.2]))
@settings(max_examples=60, deadline=None)
def test_no_group_is_cut_and_no_row_is_lost(groups, seed, validation_size):
    data, groups = rows([str(i) for i in range(len(groups))]), np.array(groups)
    try:
        parts = split_by_group(data, groups, test_size=0.3, validation_size=validation_size, seed=seed)
    except ConfigurationError as error:
        assume("leave nothing for" not in str(error))
        raise
    places = {name: np.array(part["sequence"][:], dtype=int) for name, part in parts.items()}
    assert sorted(np.concatenate(list(places.values())).tolist()) == list(range(len(groups)))
    assert sum(len(set(groups[place].tolist())) for place in places.values()) == len(set(groups.tolist()))
    counts = np.bincount(groups)
    assert len(places["test"]) <= max(0.3 * len(groups) + 0.5, counts[counts > 0].min(), 1)
    assert len(places["test"]) + counts.max() > 0.3 * len(groups)
    again = split_by_group(data, groups, test_size=0.3, validation_size=validation_size, seed=seed)
    assert {name: part["sequence"][:] for name, part in parts.items()} == {
        n: p["sequence"][:] for n, p in again.items()
    }


def test_too_few_groups_are_said():
    with pytest.raises(ConfigurationError, match="1 groups of 4 rows leave nothing for train"):
        split_by_group(rows("abcd"), np.zeros(4, int), test_size=0.2, validation_size=0.0, seed=0)


def test_a_group_that_would_overshoot_is_left_to_the_others(caplog):
    groups = np.concatenate([np.zeros(400, int), np.arange(1, 601)])
    data = rows([str(i) for i in range(1000)])
    for seed in range(5):
        parts = split_by_group(data, groups, test_size=0.2, validation_size=0.1, seed=seed)
        assert (len(parts["test"]), len(parts["validation"])) == (200, 100)
    with caplog.at_level(logging.WARNING):
        split_by_group(data, np.arange(1000) // 350, test_size=0.2, validation_size=0.0, seed=0)
    assert "test has 300 of 1000 rows, not 20 %: groups are large" in caplog.text


def test_mmseqs_and_cd_hit_clusters_are_read_alike(tmp_path):
    mmseqs, cd_hit = tmp_path / "cluster.tsv", tmp_path / "out.clstr"
    mmseqs.write_text("A\tA\nA\tB\nsp|P1|X\tsp|P1|X\n")
    cd_hit.write_text(">Cluster 0\n0\t120aa, >A... *\n1\t118aa, >B... at 98.30%\n>Cluster 1\n0\t90aa, >sp|P1|X... *\n")
    assert read_clusters(mmseqs) == read_clusters(cd_hit) == {"A": 0, "B": 0, "P1": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A\tA\nA B\n", "line 2: neither a representative"),
        ("A\tA\nB\tA\n", "line 2: A stands in two clusters"),
        ("\n", "names no sequence"),
    ],
)
def test_broken_clusters_name_the_line(tmp_path, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=message):
        read_clusters(tmp_path / "file")


def test_a_sequence_in_two_splits_is_found_and_one_twice_in_a_split_is_counted(caplog):
    parts = {"train": rows(["MK", "MV", "MV"]), "validation": rows(["MA"]), "test": rows(["MC", "MK"])}
    with pytest.raises(DataError, match=r"1 sequence\(s\) stand in two splits.*P0 = P1 \(train and test\)"):
        check_leaks(parts)
    with caplog.at_level(logging.WARNING):
        check_leaks({"train": parts["train"], "validation": parts["validation"]})
    assert "1 sequence(s) stand more than once" in caplog.text


def test_equal_sequences_are_one_group():
    found = sequence_groups(rows(["MK", "MV", "MK", "MA"]))
    assert found[0] == found[2]
    assert len(set(found.tolist())) == 3
