"""A table without splits is split by clusters of MMseqs2, if it is installed."""

from __future__ import annotations

import itertools
import shutil
import stat

import pytest
from datasets import ClassLabel, Dataset
from sequence_files import frame, write

from esm_efficient import load_sequences
from esm_efficient.data import clustering
from esm_efficient.data.clustering import OPTIONS, PROGRAM_VARIABLE, cluster_rows, find_mmseqs
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.given import splits_from

pytestmark = pytest.mark.usefixtures("table_cache")

PROGRAM = """#!/bin/sh
# What MMseqs2 is asked for is written down, and sequences of one first letter are a cluster.
echo "$@" >> "{folder}/calls"
[ -e "{folder}/fail" ] && echo "cannot do this" >&2 && exit 1
awk '/^>/ {{name = substr($1, 2); next}} {{letter = substr($0, 1, 1); if (!(letter in first)) first[letter] = name;
  print first[letter] "\\t" name}}' "$2" > "$3_cluster.tsv"
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in the place of MMseqs2, and its folder."""
    path = tmp_path / "bin" / "mmseqs"
    path.parent.mkdir()
    path.write_text(PROGRAM.format(folder=path.parent))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv(PROGRAM_VARIABLE, str(path))
    return path


def test_a_dataset_whose_labels_have_a_type_is_split_by_clusters_too(tmp_path, program, caplog):
    rows = {"sequence": load_sequences(table(tmp_path), split=False, clusters=False)["train"]["sequence"][:]}
    rows["label"] = [len(text) % 2 for text in rows["sequence"]]
    data = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"]))
    splits = splits_from(data)
    letters = [{text[0] for text in part["sequence"]} for part in splits.values()]
    assert not any(one & other for one, other in itertools.combinations(letters, 2))
    assert f"the split is by {len(set().union(*letters))} clusters of MMseqs2" in caplog.text
    apart = splits_from(data, clusters=False, test_size=0.5)
    assert len(apart["test"]) > len(splits["test"])
    file = tmp_path / "clusters.tsv"
    file.write_text("".join(f"{text[0]}\tr{row}\n" for row, text in enumerate(rows["sequence"])))
    with pytest.raises(ConfigurationError, match=r"names accessions, and the Dataset has no such column"):
        splits_from(data, clusters=str(file))
    named = data.add_column("accession", [f"r{row}" for row in range(len(data))])
    parts = splits_from(named, clusters=str(file), seed=1)
    letters = [{text[0] for text in part["sequence"]} for part in parts.values()]
    assert not any(one & other for one, other in itertools.combinations(letters, 2))
    with pytest.raises(ConfigurationError, match=r"only split\. It takes test_size, validation_size, seed, clusters"):
        splits_from(data, label="x")


def table(tmp_path, letters="ACDEFGHIKLMNPQRSTVWY", rows=80):
    given = frame(rows)
    sequences = [f"{letters[row % len(letters)]}{text}" for row, text in enumerate(given["sequence"])]
    return write(given[["id", "label"]].assign(sequence=sequences), tmp_path / "t.csv")


def test_clusters_are_in_one_split_and_are_computed_once(tmp_path, program, caplog):
    path = table(tmp_path)
    data = load_sequences(path)
    letters = {name: {text[0] for text in split["sequence"]} for name, split in data.items()}
    assert set(letters) == {"train", "validation", "test"}
    assert not letters["train"] & letters["test"]
    assert not letters["train"] & letters["validation"]
    assert "by 20 clusters of MMseqs2 (--min-seq-id 0.3 -c 0.8); clusters=False splits at random" in caplog.text
    load_sequences(path, seed=3)
    [call] = (program.parent / "calls").read_text().splitlines()
    assert call.startswith("easy-cluster ")
    assert call.endswith(" ".join(OPTIONS))


def test_a_split_that_is_given_or_refused_needs_no_clusters(tmp_path, program):
    path = table(tmp_path)
    with pytest.warns(UserWarning, match="A random split"):
        load_sequences(path, clusters=False)
    load_sequences({"train": path, "test": write(frame(100)[80:], tmp_path / "u.csv")})
    assert not (program.parent / "calls").exists()


def test_one_cluster_or_a_program_that_fails_leaves_a_random_split(tmp_path, program, caplog):
    with pytest.warns(UserWarning, match="A random split"):
        load_sequences(table(tmp_path, letters="A"))
    assert "clusters of MMseqs2 cannot divide the sequences, so the split is random" in caplog.text
    (program.parent / "fail").touch()
    with pytest.warns(UserWarning, match="A random split"):
        load_sequences(table(tmp_path, letters="AC"))
    assert "failed, so that there are no clusters: cannot do this" in caplog.text


def test_mmseqs_is_found_on_the_path_unless_the_variable_says_otherwise(program, monkeypatch):
    monkeypatch.setattr(clustering.shutil, "which", lambda name: f"/found/{name}")
    monkeypatch.delenv(PROGRAM_VARIABLE)
    assert find_mmseqs() == "/found/mmseqs"
    monkeypatch.setenv(PROGRAM_VARIABLE, "")
    assert find_mmseqs() is None


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_the_real_program_finds_relatives(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.delenv(PROGRAM_VARIABLE)
    first = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNL" * 2
    second = "MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCG" * 2
    rows = [first, second, first[:-3] + "AAA", second[:-3] + "GGG", first]
    found = cluster_rows(Dataset.from_dict({"sequence": rows}))
    assert found is not None
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] != found[0]
