"""Splits: groups stay whole, classes keep their frequencies, and cluster files of both programs are read."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esm_efficient.data.splits import (
    apportion,
    cluster_groups,
    read_clusters,
    sequence_groups,
    split_at_random,
    split_by_group,
    stratified_sample,
)
from esm_efficient.errors import ConfigurationError, DataError


def rows(sequences):
    return Dataset.from_dict({"sequence": list(sequences), "accession": [f"P{i}" for i in range(len(sequences))]})


def labelled(labels, sequences=None):
    data = rows([f"M{i}" for i in range(len(labels))] if sequences is None else sequences)
    names = [f"class{i}" for i in range(max(labels) + 1)]
    return data.add_column("label", list(labels)).cast_column("label", ClassLabel(names=names))


def class_counts(split, classes):
    return np.bincount(split["label"][:], minlength=classes)


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


def test_too_few_groups_are_an_error():
    with pytest.raises(
        ConfigurationError, match=r"4 row\(s\) in 1 group\(s\) .*leave nothing for train .*least 2 groups"
    ):
        split_by_group(rows("abcd"), np.zeros(4, int), test_size=0.2, validation_size=0.0, seed=0)


def test_a_group_that_is_too_large_for_a_split_goes_into_another(caplog):
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
        ("A\tA\nA B\n", "line 2: expected a representative and a member"),
        ("A\tA\nB\tA\n", "line 2: A is in two clusters"),
        ("\n", "names no sequence"),
    ],
)
def test_broken_clusters_name_the_line(tmp_path, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=message):
        read_clusters(tmp_path / "file")


def test_equal_sequences_are_one_group():
    found = sequence_groups(rows(["MK", "MV", "MK", "MA"]))
    assert found[0] == found[2]
    assert len(set(found.tolist())) == 3


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**20), st.integers(0, 2**20))
@settings(max_examples=300, deadline=None)
def test_every_class_is_divided_in_proportion_within_one_row(counts, first, second):
    total = sum(counts)
    first %= total + 1
    second %= total - first + 1
    sizes = (first, second, total - first - second)
    table = apportion(np.array(counts), sizes)
    assert table.sum(0).tolist() == list(sizes)
    assert table.sum(1).tolist() == counts
    assert table.min() >= 0
    assert np.abs(table - np.outer(counts, sizes) / total).max() <= 1
    # Of two parts, the first gets the largest remainders.
    shares = np.array(counts) * first / total
    up = (table := apportion(np.array(counts), (first, total - first)))[:, 0] > np.floor(shares + 1e-9)
    remainders = shares - np.floor(shares + 1e-9)
    assert remainders[up].min(initial=1) >= remainders[~up].max(initial=0) - 1e-9


@given(
    st.lists(st.integers(0, 4), min_size=6, max_size=80),
    st.integers(0, 3),
    st.sampled_from([0.2, 0.35]),
    st.sampled_from([0.0, 0.1, 0.3]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:A random split")
def test_a_random_split_keeps_the_class_frequencies_within_one_row(labels, seed, test_size, validation_size):
    data = labelled(labels)
    splits = split_at_random(data, test_size=test_size, validation_size=validation_size, seed=seed)
    assert sorted(accession for split in splits.values() for accession in split["accession"]) == sorted(
        data["accession"]
    )
    assert list(splits) == ["train", *(["validation"] if validation_size else []), "test"]
    whole = np.bincount(labels)
    for split in splits.values():
        assert np.abs(class_counts(split, len(whole)) - whole * len(split) / len(labels)).max() <= 1
    assert len(splits["test"]) == max(round(test_size * len(labels)), 1)


def test_a_random_split_is_seeded_and_names_the_caller_in_its_warning():
    data = labelled([0, 1] * 20)
    with pytest.warns(UserWarning, match="homologous") as caught:
        first = split_at_random(data, test_size=0.25, validation_size=0.0, seed=3, stacklevel=2)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="homologous"):
        again, other = (split_at_random(data, test_size=0.25, validation_size=0.0, seed=s) for s in (3, 4))
    assert first["test"]["accession"][:] == again["test"]["accession"][:]
    assert first["test"]["accession"][:] != other["test"]["accession"][:]


@pytest.mark.filterwarnings("ignore:A random split")
def test_a_random_split_keeps_equal_sequences_together_and_near_its_sizes():
    rng = np.random.default_rng(0)
    for seed in range(5):
        sequences = [f"M{i}" for i in rng.integers(0, 150, size=300)]
        data = labelled([int(sequence[1:]) % 3 for sequence in sequences], sequences)
        splits = split_at_random(data, test_size=0.2, validation_size=0.1, seed=seed)
        found = [set(split["sequence"]) for split in splits.values()]
        assert sum(map(len, found)) == len(set(sequences))
        assert [len(split) for split in splits.values()] == pytest.approx([210, 30, 60], abs=3)
        for split in splits.values():
            np.testing.assert_allclose(class_counts(split, 3) / len(split), class_counts(data, 3) / 300, atol=0.1)


@pytest.mark.filterwarnings("ignore:A random split")
def test_a_random_split_works_with_classes_of_one_member_and_without_classes():
    data = labelled([0] * 10 + [1, 2, 3])
    splits = split_at_random(data, test_size=0.3, validation_size=0.2, seed=0)
    assert [len(split) for split in splits.values()] == [6, 3, 4]
    splits = split_at_random(rows("abcdefghij"), test_size=0.3, validation_size=0.2, seed=0)
    assert [len(split) for split in splits.values()] == [5, 2, 3]
    with pytest.raises(
        ConfigurationError, match=r"2 row\(s\) in 2 group\(s\) .*leave nothing for train .*least 3 groups"
    ):
        split_at_random(rows("ab"), test_size=0.3, validation_size=0.2, seed=0)


def test_a_sample_has_every_class_in_proportion():
    data = labelled([0] * 70 + [1] * 20 + [2] * 10)
    assert class_counts(stratified_sample(data, 15), 3).tolist() == [11, 3, 1]


@given(
    st.integers(30, 200),
    st.lists(st.integers(1, 4), min_size=3, max_size=12),
    st.integers(0, 9),
    st.sampled_from([0.1, 0.2]),
)
@settings(max_examples=60, deadline=None)
def test_a_group_that_dominates_is_for_training_and_the_others_are_divided(largest, others, seed, validation_size):
    assume(sum(others) < 0.25 * (largest + sum(others)))
    sizes = [*others[:1], largest, *others[1:]]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    data = rows([str(i) for i in range(len(groups))])
    parts = split_by_group(data, groups, test_size=0.2, validation_size=validation_size, seed=seed)
    places = {name: set(groups[np.array(part["sequence"][:], dtype=int)].tolist()) for name, part in parts.items()}
    assert 1 in places["train"]
    assert places["test"]
    assert places["validation"]
    assert sum(map(len, places.values())) == len(sizes)
    classes = groups % 2
    parts = split_by_group(data, groups, test_size=0.2, validation_size=validation_size, seed=seed, classes=classes)
    assert {name for name, part in parts.items() if len(part)} == {"train", "validation", "test"}
    assert len(parts["train"]) >= largest


def test_variants_of_one_protein_are_not_to_be_split_by_cluster():
    rng, letters = np.random.default_rng(0), list("ACDEFGHIKLMNPQRSTVWY")
    protein = rng.choice(letters, 200)
    variants = []
    for position in rng.integers(0, 200, 60):
        variant = protein.copy()
        variant[position] = rng.choice(letters)
        variants.append("".join(variant))
    with pytest.warns(UserWarning, match="variants of one protein.*split by the position of the mutations"):
        split_at_random(rows(variants), test_size=0.2, validation_size=0.1, seed=0)
    proteins = ["".join(rng.choice(letters, 200)) for _ in range(60)]
    with pytest.warns(UserWarning, match=r"by cluster \(clusters=\)") as caught:
        split_at_random(rows(proteins), test_size=0.2, validation_size=0.1, seed=0)
    assert not any("variants" in str(warning.message) for warning in caught)


def test_clusters_of_other_names_ask_for_the_accessions(tmp_path):
    path = tmp_path / "cluster.tsv"
    path.write_text("P1\tP1\nP1\tP2\n")
    with pytest.raises(
        DataError, match=r"no cluster for any of the 2 .* 't.csv, line 2', and the clusters 'P1'. .*accession="
    ):
        cluster_groups(["t.csv, line 2", "t.csv, line 3"], read_clusters(path), path)
    with pytest.raises(DataError, match="no cluster for 1 of 2 sequences: P3"):
        cluster_groups(["P1", "P3"], read_clusters(path), path)


def test_the_largest_group_is_for_training_where_the_test_set_is_larger():
    groups = np.repeat(np.arange(86), [15, *[1] * 85])
    for seed in range(5):
        parts = split_by_group(
            rows([str(i) for i in range(100)]), groups, test_size=0.8, validation_size=0.1, seed=seed
        )
        assert sorted(parts["train"]["sequence"][:], key=int) == [str(row) for row in range(15)]
