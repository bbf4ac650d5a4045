"""The synthetic table has the schema and the format of the real one, and every family is in one partition."""

from __future__ import annotations

import difflib

import numpy as np
import pandas as pd
import pytest

from esm_efficient import ConfigurationError, load_deeploc, write_demo_table
from esm_efficient.data.deeploc import COLUMNS, LOCATIONS


@pytest.fixture(scope="module")
def frame(demo_table):
    return pd.read_csv(demo_table)


def test_schema_and_quirks(demo_table, frame):
    raw = demo_table.read_bytes()
    assert raw.startswith(b",ACC,Kingdom,Partition,Membrane,Cytoplasm,")
    assert raw.count(b"\n") == raw.count(b"\r\n") == len(frame) + 1 == 301
    assert list(frame.columns[1:]) == list(COLUMNS)
    assert frame["Sequence"].is_monotonic_increasing
    assert set(raw.split(b"\r\n")[1].split(b",")[4:15]) <= {b"0.0", b"1.0"}
    assert sorted(frame["Partition"].unique()) == [0, 1, 2, 3, 4]
    lengths = frame["Sequence"].str.len()
    assert (lengths < 100).any()
    assert (lengths > 512).any()
    assert 0.2 < frame["Membrane"].mean() < 0.45
    assert (frame[list(LOCATIONS)].sum(axis=1) >= 1).all()
    assert (frame[list(LOCATIONS)].sum(axis=1) >= 2).any()
    assert (frame["Membrane"] != frame["Cell membrane"]).any()
    assert frame["Sequence"].str.fullmatch("[ACDEFGHIKLMNPQRSTVWYXUB]+").all()
    assert frame["ACC"].str.startswith("SYNTH").all()
    assert not frame["Sequence"].duplicated().any()


def test_the_same_seed_gives_the_same_file(tmp_path):
    first, again, other = (
        write_demo_table(tmp_path / f"{i}.csv", proteins=100, seed=s).read_bytes() for i, s in enumerate((4, 4, 5))
    )
    assert first == again
    assert first != other


def test_families_lie_within_one_partition(frame):
    """Two proteins that share a run of 12 residues are relatives: unrelated proteins do not share one."""
    where: dict[str, set[int]] = {}
    for sequence, partition in zip(frame["Sequence"], frame["Partition"], strict=True):
        for i in range(len(sequence) - 11):
            where.setdefault(sequence[i : i + 12], set()).add(partition)
    shared = [run for run, partitions in where.items() if len(partitions) > 1]
    assert shared == []
    rng = np.random.default_rng(0)
    runs = pd.Series([s[i : i + 12] for s in frame["Sequence"] for i in range(0, len(s) - 11)])
    assert runs.duplicated().sum() > 100, "the table has relatives"
    assert difflib.SequenceMatcher(None, *frame["Sequence"].sample(2, random_state=int(rng.integers(9)))).ratio() < 0.5


def test_membrane_proteins_are_hydrophobic_but_composition_alone_does_not_separate_them(frame):
    greasy = frame["Sequence"].map(lambda s: sum(s.count(r) for r in "AILVFGMW") / len(s))
    membrane, soluble = greasy[frame["Membrane"] == 1], greasy[frame["Membrane"] == 0]
    assert membrane.mean() > soluble.mean() + 0.03
    assert membrane.quantile(0.1) < soluble.quantile(0.9)


def test_too_few_proteins_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="at least 100"):
        write_demo_table(tmp_path / "table.csv", proteins=99)


def test_the_loader_reads_it(demo_table):
    data = load_deeploc(demo_table)
    assert {name: set(split["label"]) for name, split in data.items()} == {
        "train": {0, 1},
        "validation": {0, 1},
        "test": {0, 1},
    }
